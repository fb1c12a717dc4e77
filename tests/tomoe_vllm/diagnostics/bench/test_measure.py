"""Timing of tomoe bench: order of the calls and summary of the samples."""

from types import SimpleNamespace

import pytest
import torch

from tomoe_vllm.diagnostics.bench.measure import CudaClock, interleave, machine, summary


def test_calls_run_once_per_round_in_random_order_and_warm_up_is_not_counted():
    order = []
    samples = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=40, warm_up=10)
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(rounds) == 50
    assert {tuple(sorted(pair)) for pair in rounds} == {("a", "b")}
    assert 10 < rounds.count(["a", "b"]) < 40
    assert [len(values) for values in samples.values()] == [40, 40]


def test_summary_is_median_and_quartiles():
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0], 10) == {"median": 30.0, "low": 15.0, "high": 45.0}


class FakeDevice:
    """What CudaClock uses of CudaDevice."""

    def capture(self, run):
        run()
        return SimpleNamespace(replay=run)

    def milliseconds_once(self, replay):
        replay()
        return 3.0


def test_cuda_clock_times_the_replay_of_a_graph():
    log = []
    clock = CudaClock(FakeDevice())
    replay = clock.prepare(lambda: log.append("call"))
    assert log == ["call"]
    assert interleave({"call": replay}, rounds=1, warm_up=0, clock=clock) == {"call": [pytest.approx(3e-3)]}
    assert log == ["call", "call"]


def test_machine_names_the_gpu_only_where_it_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert machine("cuda").items() >= {"gpu": "NVIDIA H200"}.items()
    assert machine().keys() == {"cpu", "isa", "num_cores", "date"}
