"""Traces store experts by position, and their memory is bounded."""

from types import SimpleNamespace

import numpy as np

from tomoe_vllm.observability import expert_traces
from tomoe_vllm.observability.expert_traces import MAX_TRACE_TOKENS, MAX_TRACES, NOT_COMPUTED, ExpertTraces

LAYERS = 3


def request(name: str, trace_id: object = None, *, prompt=10, computed=0):
    """A new request in vLLM's scheduler output."""
    params = SimpleNamespace(extra_args=None if trace_id is None else {"tomoe_trace": trace_id})
    return SimpleNamespace(
        req_id=name, sampling_params=params, prompt_token_ids=[0] * prompt, num_computed_tokens=computed
    )


def step(traces, *, new=(), running=(), finished=(), tokens=None, order=None):
    """Run one step. ``running``: (name, position). The expert of row r at layer l is 10 l + r."""
    tokens = tokens or {}
    output = SimpleNamespace(
        scheduled_new_reqs=list(new),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in running], num_computed_tokens=[position for _, position in running]
        ),
        finished_req_ids=set(finished),
        num_scheduled_tokens=tokens,
    )
    found = traces.begin_step(output, list(order or tokens))
    if found is not None:
        total = sum(tokens.values())
        found.store((10 * np.arange(LAYERS)[:, None] + np.arange(total)).astype(np.uint8))
    return found


def test_requests_without_a_trace_id_are_not_traced():
    traces = ExpertTraces(num_layers=LAYERS)
    assert step(traces, new=[request("a"), request("b", 7)], tokens={"a": 3, "b": 2}) is None
    assert step(traces, new=[request("c", "x" * 200)], tokens={"c": 1}) is None


def test_rows_are_located_by_the_order_of_the_batch():
    traces = ExpertTraces(num_layers=LAYERS)
    step(traces, new=[request("a"), request("b", "t")], tokens={"a": 3, "b": 2}, order=["b", "a"])
    assert traces.get("t").experts[:2].tolist() == [[0, 10, 20], [1, 11, 21]]
    step(traces, running=[("a", 3), ("b", 2)], tokens={"a": 1, "b": 1}, order=["a", "b"])
    assert traces.get("t").experts[2].tolist() == [1, 11, 21]


def test_recomputed_tokens_are_stored_once():
    traces = ExpertTraces(num_layers=LAYERS)
    step(traces, new=[request("b", "t", prompt=4)], tokens={"b": 4})
    step(traces, running=[("b", 4)], tokens={"b": 1})
    step(
        traces, new=[request("b", "t", prompt=4)], tokens={"b": 5}
    )  # after a preemption, as vLLM's second model runner reports it
    assert traces.get("t").num_tokens == 5
    assert traces.get("t").experts[:5, 0].tolist() == [0, 1, 2, 3, 4]


def test_cached_tokens_stay_not_computed():
    traces = ExpertTraces(num_layers=LAYERS)
    step(traces, new=[request("b", "t", computed=6)], tokens={"b": 4})
    trace = traces.get("t")
    assert (trace.num_cached_tokens, trace.num_tokens) == (6, 10)
    assert (trace.experts[:6] == NOT_COMPUTED).all()
    assert (trace.experts[6:10] != NOT_COMPUTED).all()


def test_finished_requests_are_marked_and_no_longer_traced():
    traces = ExpertTraces(num_layers=LAYERS)
    step(traces, new=[request("b", "t")], tokens={"b": 4})
    step(traces, finished=["b"], tokens={})
    assert traces.get("t").is_finished
    assert step(traces, running=[("c", 1)], tokens={"c": 1}) is None


def test_memory_is_bounded():
    traces = ExpertTraces(num_layers=LAYERS)
    for i in range(MAX_TRACES + 5):
        step(traces, new=[request(f"r{i}", f"t{i}")], tokens={f"r{i}": 2})
    assert traces.get("t4") is None
    assert traces.get("t5") is not None
    assert len(traces._running) == MAX_TRACES
    trace = traces.get(f"t{MAX_TRACES}")
    trace.put(MAX_TRACE_TOKENS - 2, np.ones((5, LAYERS), dtype=np.uint8))
    trace.put(MAX_TRACE_TOKENS + 7, np.ones((1, LAYERS), dtype=np.uint8))
    assert len(trace.experts) == trace.num_tokens == MAX_TRACE_TOKENS


def test_not_computed_is_not_an_expert_id():
    assert expert_traces.NOT_COMPUTED == 255  # routers refuse more than 255 experts: 0 to 254
