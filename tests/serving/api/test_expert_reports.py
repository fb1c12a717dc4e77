"""Merging the workers' reports: tokens counted once, neurons added up, layers in order."""

import pytest
from tomoe_serving.api.expert_reports import imbalance, merge_counts, merge_trace

from tomoe_vllm.observability.expert_traces import NOT_COMPUTED


def counts(first_layer, rank, tokens, unions, neurons=40):
    return {
        "first_layer": first_layer, "num_layers": len(tokens), "num_experts": 4, "tensor_parallel_rank": rank,
        "tensor_parallel_size": 2, "num_neurons": neurons, "num_steps": 3, "num_tokens": 8, "tokens": tokens,
        "union_neurons": unions, "step_paths": {"shared_packed": 1, "shared_streamed": 2},
    }  # fmt: skip


TWO_STAGES = [
    counts(1, 1, [[8, 0, 0, 0]], [10.0]),
    counts(0, 0, [[2, 2, 2, 2]], [30.0]),
    counts(1, 0, [[8, 0, 0, 0]], [10.0]),
    counts(0, 1, [[2, 2, 2, 2]], [20.0]),
]


def test_tokens_are_taken_from_one_rank_and_neurons_added_up():
    report = merge_counts(TWO_STAGES)
    assert report.tokens == [[2, 2, 2, 2], [8, 0, 0, 0]]
    assert report.load_imbalance == [1.0, 4.0]
    assert report.neuron_union_ratio == [50 / 80, 20 / 80]
    assert (report.num_layers, report.num_experts, report.num_steps, report.num_tokens) == (2, 4, 3, 8)


def test_imbalance_without_tokens_is_none():
    assert imbalance([0, 0]) is None


def trace(first_layer, rows, num_tokens, is_finished=True):
    return {
        "first_layer": first_layer, "num_layers": 2, "num_experts": 4, "tensor_parallel_rank": 0,
        "tensor_parallel_size": 1, "num_prompt_tokens": 2, "num_cached_tokens": 1, "num_tokens": num_tokens,
        "is_finished": is_finished, "experts": bytes(rows),
    }  # fmt: skip


def test_trace_joins_the_layers_up_to_the_slowest_stage():
    none = NOT_COMPUTED
    found = merge_trace("t", 0, [trace(2, [none, none, 5, 6, 7, 8], 3), trace(0, [none, none, 1, 2], 2, False), None])
    assert found.experts == [None, [1, 2, 5, 6]]
    assert (found.num_tokens, found.is_finished, found.num_cached_tokens) == (2, False, 1)
    assert merge_trace("t", 2, [trace(0, [], 2)]).experts == []
    assert merge_trace("t", 0, [None, None]) is None


@pytest.mark.parametrize("start", [0, 1])
def test_trace_begins_at_its_start(start):
    rows = [1, 2, 3, 4]
    assert len(merge_trace("t", start, [trace(0, rows[2 * start :], 2)]).experts) == 2 - start
