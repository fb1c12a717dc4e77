"""Cost of the expert statistics: steps with and without them alternate in one engine and one process.

    python benchmarks/expert_metrics.py CHECKPOINT [--streams 1 8] [--steps 600]

Requests decode in one batch and every step is timed. Statistics are switched on and off from step to step, so that
noise of the machine affects both alike; the order within a pair alternates. "on" includes recording the experts of
every layer, reading them after the step, counting, and a trace of every request.

    paired_ratio   median over the pairs of (time with / time without), with the interval of its bootstrap
    read_us        time of reading and counting within the step, with cold caches
    route_us       time that recording adds to routing in all layers, measured separately

JSON last.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

LIMIT = 0.01


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of the expert statistics in a step")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="requests that decode in one batch")
    parser.add_argument("--steps", type=int, default=600, help="timed steps for each number of streams")
    return parser.parse_args()


def start(folder: Path):
    """Start the engine in this process with statistics; returns its LLM and its worker."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    from vllm import LLM

    llm = LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=2048, disable_log_stats=True,
        worker_extension_cls="tomoe_vllm.observability.worker_extension.ExpertExtension",
        additional_config={"tomoe_expert_statistics": True},
    )  # fmt: skip
    (reason,) = llm.collective_rpc("tomoe_start_experts")
    if reason is not None:
        raise SystemExit(reason)
    return llm, llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


class Switch:
    """Switches the statistics of a worker on and off."""

    def __init__(self, worker):
        self.steps = worker._tomoe_observer.steps
        self.gates = [module for module in worker.get_model().modules() if hasattr(module, "record")]
        self.records = [gate.record for gate in self.gates]
        self.read_us: list[float] = []
        self._on_step, self.steps._on_step = self.steps._on_step, self._timed

    def _timed(self, step) -> None:
        began = time.perf_counter()
        self._on_step(step)
        self.read_us.append((time.perf_counter() - began) * 1e6)

    def set(self, is_on: bool) -> None:
        for gate, record in zip(self.gates, self.records, strict=True):
            gate.record = record if is_on else None
        if is_on:
            self.steps.attach()
        else:
            self.steps.detach()


def time_steps(llm, switch: Switch, streams: int, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of decode steps with and without statistics, in pairs."""
    from vllm import SamplingParams

    engine, with_ms, without_ms = llm.llm_engine, [], []
    switch.set(True)
    for i in range(streams):
        params = SamplingParams(
            temperature=0, max_tokens=steps + 20, ignore_eos=True, extra_args={"tomoe_trace": f"{streams}-{i}"}
        )
        engine.add_request(f"{streams}-{i}", {"prompt_token_ids": list(range(100 + i, 116 + i))}, params)
    for _ in range(10):
        engine.step()
    for pair in range(steps // 2):
        for is_on in (pair % 2 == 0, pair % 2 == 1):
            switch.set(is_on)
            began = time.perf_counter()
            engine.step()
            (with_ms if is_on else without_ms).append((time.perf_counter() - began) * 1e3)
    engine.abort_request([f"{streams}-{i}" for i in range(streams)])
    while engine.has_unfinished_requests():
        engine.step()
    return with_ms, without_ms


def time_routing(switch: Switch, streams: int, repetitions: int = 300) -> float:
    """Microseconds that recording adds to the routing of one step: difference of the medians of alternating calls."""
    import torch

    hidden = torch.randn(streams, switch.gates[0].router.weight.shape[1])
    times: dict[bool, list[float]] = {True: [], False: []}
    for repetition in range(2 * repetitions):
        switch.set(is_on := repetition % 2 == 0)
        began = time.perf_counter()
        for gate in switch.gates:
            gate(hidden)
        times[is_on].append((time.perf_counter() - began) * 1e6)
    return statistics.median(times[True]) - statistics.median(times[False])


def interval(ratios: list[float], repetitions: int = 1000) -> list[float]:
    """90 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(repetitions))
    return [round(medians[repetitions // 20], 4), round(medians[-repetitions // 20], 4)]


def time_of_reading(times_us: list[float], block: int = 32) -> float:
    """Microseconds per step. Steps are counted 32 together, so this is the median of means over 32 steps."""
    means = [statistics.mean(times_us[i : i + block]) for i in range(0, len(times_us) - block + 1, block)]
    return statistics.median(means)


def measure(llm, switch: Switch, streams: int, steps: int) -> dict[str, object]:
    switch.read_us.clear()
    with_ms, without_ms = time_steps(llm, switch, streams, steps)
    read = time_of_reading(switch.read_us)
    routing = time_routing(switch, streams)
    step = statistics.median(without_ms)
    ratios = [a / b for a, b in zip(with_ms, without_ms, strict=True)]
    result = {
        "streams": streams,
        "steps": len(with_ms) + len(without_ms),
        "step_ms": round(step, 3),
        "paired_ratio": round(statistics.median(ratios), 4),
        "paired_ratio_90": interval(ratios),
        "read_us": round(read, 1),
        "route_us": round(routing, 1),
        "added_share": round((read + max(routing, 0)) / step / 1e3, 5),
    }
    print(
        f"{streams:>3} streams: step {step:.2f} ms, with statistics x {result['paired_ratio']:.4f} "
        f"{result['paired_ratio_90']}; reading takes {read:.0f} us and recording {routing:.0f} us, "
        f"{100 * result['added_share']:.2f} % of the step",
        file=sys.stderr,
    )
    return result


def main() -> None:
    options = settings()
    llm, worker = start(options.checkpoint)
    switch = Switch(worker)
    results = [measure(llm, switch, streams, options.steps) for streams in options.streams]
    is_cheap = all(result["added_share"] < LIMIT for result in results)
    print(json.dumps({"checkpoint": options.checkpoint.name, "results": results, "is_under_one_percent": is_cheap}))
    sys.stdout.flush()
    os._exit(0 if is_cheap else 1)  # vLLM's threads may abort the interpreter's own exit


if __name__ == "__main__":
    main()
