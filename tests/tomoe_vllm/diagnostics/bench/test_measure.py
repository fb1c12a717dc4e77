"""Timing of tomoe bench: order of the calls and summary of the samples."""

import contextlib
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


class FakeCuda:
    """What CudaClock uses of torch.cuda: it notes the order of what runs, and a graph replays what it captured."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.is_capturing = False
        self.cuda = SimpleNamespace(
            Stream=lambda: SimpleNamespace(wait_stream=lambda other: self.log.append("wait")),
            current_stream=lambda: SimpleNamespace(wait_stream=lambda other: self.log.append("wait")),
            stream=lambda stream: contextlib.nullcontext(),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            graph=self.capture,
            Event=lambda enable_timing: SimpleNamespace(
                record=lambda: self.log.append("record"),
                synchronize=lambda: self.log.append("synchronize"),
                elapsed_time=lambda end: 3.0,
            ),
        )

    @contextlib.contextmanager
    def capture(self, graph):
        self.is_capturing = True
        yield
        self.is_capturing = False


def test_cuda_clock_times_the_replay_of_a_graph_with_events(monkeypatch):
    fake, clock = FakeCuda(), CudaClock()
    monkeypatch.setattr(torch, "cuda", fake.cuda)
    replay = clock.prepare(lambda: fake.log.append("captured" if fake.is_capturing else "compiled"))
    assert fake.log == ["wait", "compiled", "compiled", "wait", "captured"]
    fake.log.clear()
    assert interleave({"call": replay}, rounds=1, warm_up=0, clock=clock) == {"call": [pytest.approx(3e-3)]}
    assert fake.log == ["record", "replay", "record", "synchronize"]


def test_machine_names_the_gpu_only_where_it_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert machine("cuda").items() >= {"gpu": "NVIDIA H200"}.items()
    assert machine().keys() == {"cpu", "isa", "num_cores", "date"}
