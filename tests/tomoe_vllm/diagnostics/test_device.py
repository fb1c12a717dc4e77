"""Graphs and times of a GPU, on a simulated ``torch.cuda``."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tomoe_vllm.diagnostics.device import CudaDevice, InterpretedDevice


class SimulatedCuda:
    """Streams, graphs and events. A graph replays the functions called while it was captured; ``clock`` is in ms."""

    def __init__(self, monkeypatch):
        self.clock, self.log, self.graph = 0.0, [], None
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        names = {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda s: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(calls=[], replay=None),
            "graph": self.capturing,
            "Event": lambda enable_timing: Event(self),
            "get_device_name": lambda: "NVIDIA H200",
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def capturing(self, graph):
        self.graph = graph
        graph.replay = lambda: [self.advance(ms) for ms in graph.calls]
        yield
        self.graph = None

    def kernel(self, ms):
        """Run a kernel of ``ms``, or capture it."""
        if self.graph is not None:
            self.graph.calls.append(ms)
        else:
            self.advance(ms)
        return torch.zeros(1)

    def advance(self, ms):
        self.clock += ms


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.time = self.cuda.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.time - self.time


@pytest.fixture
def cuda(monkeypatch):
    return SimulatedCuda(monkeypatch)


@pytest.fixture
def device(cuda, monkeypatch):
    class Device(CudaDevice):
        type = "cpu"

    device = Device()
    assert device._flush.numel() == 256 << 20
    device._flush = SimpleNamespace(zero_=lambda: cuda.advance(100.0))  # it must not be timed
    return device


def test_a_call_is_warmed_up_before_it_is_captured(cuda, device):
    calls = []
    device.capture(lambda: calls.append(cuda.graph) or torch.zeros(1))
    assert len(calls) == 2
    assert calls[0] is None
    assert calls[1] is not None
    assert cuda.log == ["wait", "wait"]


def test_time_of_a_replay_is_without_the_flush(cuda, device):
    graph = device.capture(lambda: cuda.kernel(3.0))
    assert device.milliseconds(graph) == pytest.approx(3.0)


def test_time_of_one_more_call_is_without_what_a_graph_costs_once(cuda, device, monkeypatch):
    capturing = cuda.capturing

    @contextlib.contextmanager
    def with_launch(graph):
        with capturing(graph):
            graph.calls.append(7.0)
            yield

    monkeypatch.setattr(torch.cuda, "graph", with_launch)
    assert device.milliseconds_per_call(lambda: cuda.kernel(0.5)) == pytest.approx(0.5)


def test_a_graph_of_the_interpreter_runs_again_on_the_same_inputs():
    x = torch.zeros(3)
    graph = InterpretedDevice().capture(lambda: x + 1)
    x += 5
    graph.replay()
    assert graph.output.tolist() == [6.0] * 3
    assert InterpretedDevice().milliseconds(graph) is None
    assert InterpretedDevice().milliseconds_per_call(lambda: x) is None
