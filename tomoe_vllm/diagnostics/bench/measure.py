"""Interleaved timing, the machine it ran on, and the limits of that machine."""

import datetime
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from tomoe_vllm.diagnostics.device import CudaDevice

Call = Callable[[], Any]


class Clock(Protocol):
    """Times one call on a device."""

    def prepare(self, call: Call) -> Call:
        """What to time instead of ``call``."""

    def seconds(self, call: Call) -> float:
        """Run ``call`` once; the time until its results are there."""


class CpuClock:
    """The host's clock around a call that computes on the CPU."""

    def prepare(self, call: Call) -> Call:
        return call

    def seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """CUDA events around the replay of a CUDA graph with a cold L2; the host's time to launch it does not count."""

    def __init__(self, device: CudaDevice | None = None) -> None:
        self.device = device or CudaDevice()

    def prepare(self, call: Call) -> Call:
        """Capture ``call`` into a graph, after a call that compiles its kernels; returns the replay."""
        graph = self.device.capture(call)

        def replay(kept: Call = call) -> None:  # the graph reads the tensors that ``call`` holds
            graph.replay()

        return replay

    def seconds(self, call: Call) -> float:
        return self.device.milliseconds_once(call) * 1e-3


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What a figure needs beside it: CPU, instruction set, cores and the date (UTC); on "cuda" also the GPU."""
    facts = _cpu()
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return facts


def _cpu() -> dict[str, str | int]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "num_cores": len(os.sched_getaffinity(0)),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def interleave(
    calls: Mapping[str, Call], rounds: int, warm_up: int = 1, clock: Clock | None = None
) -> dict[str, list[float]]:
    """Seconds of each call in each round, by ``clock`` (default: :class:`CpuClock`).

    All calls run once per round, so that noise affects them alike, and in a new random order in each round, because
    what one call leaves in the caches speeds up or slows down the next one.
    """
    clock = clock or CpuClock()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for round_ in range(-warm_up, rounds):
        shuffle(order)
        for name in order:
            seconds = clock.seconds(calls[name])
            if round_ >= 0:
                samples[name].append(seconds)
    return samples


def summary(samples: list[float], scale: float = 1.0) -> dict[str, float]:
    """Median and quartiles, each times ``scale``."""
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {"median": median * scale, "low": low * scale, "high": high * scale}


def read_bandwidth(num_bytes: int = 1 << 29) -> float:
    """Bytes per second that this process reads from memory with all its threads.

    The best time of three readers, since which of them is fastest depends on the processor: vLLM's oneDNN linear with
    one row and with four rows, and torch's sum.
    """
    from vllm.platforms import current_platform

    from tomoe_vllm.compat import ops

    current_platform.import_kernels()
    matrix = torch.randn(num_bytes // 4 // 4096, 4096)
    handler = ops.create_onednn_mm(matrix.t(), 32)
    readers: dict[str, Call] = {
        str(num_rows): partial(ops.onednn_mm, handler, torch.randn(num_rows, 4096), None) for num_rows in (1, 4)
    }
    samples = interleave(readers | {"sum": matrix.sum}, 10)
    return num_bytes / min(min(values) for values in samples.values())


def gemm_rate(size: int = 2048) -> float:
    """Float32 operations per second of a large square GEMM, at its best of seven times."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(interleave({"gemm": lambda: a @ b}, 7)["gemm"])
