"""Counting of expert ids, without an engine. With one: tests/parity/test_expert_statistics.py."""

import numpy as np
import pytest
from torch import nn

from tomoe_vllm.observability.expert_statistics import UNION_STEPS, ExpertCounts

# Two layers, four neurons, three experts. Bit n of a neuron is set if expert n keeps it.
SIGNATURES = np.array([[0b001, 0b011, 0b111, 0b100], [0b010, 0b010, 0b000, 0b101]], dtype=np.uint8)[:, :, None]


@pytest.fixture
def counts() -> ExpertCounts:
    return ExpertCounts(signatures=SIGNATURES, num_experts=3)


def test_tokens_are_counted_per_layer_and_expert(counts):
    counts.add([np.array([[0, 0, 2], [1, 1, 1]]), np.array([[2], [0]])])
    assert counts.tokens.tolist() == [[2, 0, 2], [1, 3, 0]]
    assert (counts.num_steps, counts.num_tokens) == (2, 4)


def test_union_counts_the_neurons_of_all_experts_of_a_step(counts):
    counts.add([np.array([[0, 1], [0, 1]])])
    assert counts.union_neurons.tolist() == [3, 3]


def test_union_is_a_moving_average_over_steps(counts):
    one, three = np.array([[0], [2]]), np.array([[0, 1, 2], [0, 1, 2]])
    counts.add([one, three])
    assert counts.union_neurons.tolist() == [(3 + 4) / 2, (1 + 3) / 2]
    counts.add([one] * 20 * UNION_STEPS)
    np.testing.assert_allclose(counts.union_neurons, [3, 1], atol=1e-6)


def test_more_than_eight_experts_use_several_bytes():
    signatures = np.zeros((1, 2, 2), dtype=np.uint8)
    signatures[0, 0, 1] = 1  # neuron 0 belongs to expert 8 only
    counts = ExpertCounts(signatures=signatures, num_experts=9)
    counts.add([np.array([[8]])])
    assert counts.union_neurons.tolist() == [1]
    counts.add([np.array([[0]])])
    assert counts.union_neurons.tolist() == [0.5]


def test_a_model_without_routers_is_refused():
    from tomoe_vllm.observability.expert_statistics import ExpertRecorder

    with pytest.raises(ValueError, match="it is not a ToMoE checkpoint"):
        ExpertRecorder(nn.Linear(2, 2))
