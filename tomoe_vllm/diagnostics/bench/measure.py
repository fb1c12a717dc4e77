"""Interleaved timing, and what this machine can do at best."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch


def interleave(ways: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each way in each round. The ways take turns, so that noise hits them alike, in another order in each
    round: what one leaves in the caches helps or hinders the next one.
    """
    samples: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    for round_ in range(-warm_up, rounds):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            ways[name]()
            if round_ >= 0:
                samples[name].append(time.perf_counter() - start)
    return samples


def summary(samples: list[float], scale: float = 1.0) -> dict[str, float]:
    """Median and quartiles, each times ``scale``."""
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {"median": median * scale, "low": low * scale, "high": high * scale}


def read_bandwidth(num_bytes: int = 1 << 29) -> float:
    """Bytes per second that this process reads from memory with all its threads: the best sweep of three readers.

    vLLM's oneDNN linear with one row and with four, and torch's sum: which one reads fastest differs by processor.
    """
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    matrix = torch.randn(num_bytes // 4 // 4096, 4096)
    handler = ops.create_onednn_mm(matrix.t(), 32)
    ways: dict[str, Callable[[], object]] = {
        str(num_rows): partial(ops.onednn_mm, handler, torch.randn(num_rows, 4096), None) for num_rows in (1, 4)
    }
    samples = interleave(ways | {"sum": matrix.sum}, 10)
    return num_bytes / min(min(values) for values in samples.values())


def gemm_rate(size: int = 2048) -> float:
    """Float32 operations per second of a large square GEMM: the best of a few."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(interleave({"gemm": lambda: a @ b}, 7)["gemm"])
