"""Dense and ToMoE end to end in vLLM: decode, prefill and memory of two engines.

On CPUs the baseline is the dense model with the RMSNorm kernel that ToMoE runs, so that a ratio measures the method and
not the norm. The dense model as vLLM ships it, whose norm is plain torch on CPUs, is measured beside it. On GPUs both
models run vLLM's norm, so the baseline is the dense model as shipped.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tomoe_vllm.diagnostics.bench.measure import summary
from tomoe_vllm.diagnostics.bench.setup import EngineSetup

WORKER = "tomoe_vllm.diagnostics.bench.worker"
DECODE_ROUNDS, PREFILL_ROUNDS = 4, 6
SIZE_NAMES = {"decode": "batch", "prefill": "prompt_tokens"}
"""What a row of each timed part is for, as the results name it."""

Samples = dict[str, list[float]]
"""Seconds by variant: "dense", "tomoe", and on CPUs "dense_as_shipped"."""


class Engine:
    """A process of ``worker.py`` with one model. ``worker``: how Python finds that file."""

    def __init__(self, folder: Path, setup: EngineSetup, worker: Sequence[str] = ("-m", WORKER)) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *worker, str(folder), setup.device, json.dumps(setup.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | setup.environment,
        )
        self.folder = folder

    def answer(self) -> dict:
        """The next answer. Raises ``RuntimeError`` if the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with code {self.process.wait()} on {self.folder}; its messages are above")
        return json.loads(line)

    def ask(self, **task: int | str) -> dict:
        """Send one task and wait for its answer."""
        assert self.process.stdin is not None
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self.answer()


@contextlib.contextmanager
def start_engines(folders: dict[str, Path], setup: EngineSetup) -> Iterator[tuple[dict[str, Engine], dict[str, dict]]]:
    """Engines by name, started one after the other, and the memory of each after loading."""
    engines: dict[str, Engine] = {}
    try:
        loaded = {}
        for name, folder in folders.items():
            engines[name] = Engine(folder, setup)
            loaded[name] = engines[name].answer()
        yield engines, loaded
    finally:
        for engine in engines.values():
            engine.process.kill()
            engine.process.wait()


def bench_engines(folders: dict[str, Path], parts: list[str], setup: EngineSetup) -> dict[str, Any]:
    """Results of ``parts`` (decode, prefill, memory) for the models in ``folders`` ("dense" and "tomoe").

    Both engines run at once and alternate, or one after the other if ``setup`` says so. ``path`` of a row is the
    execution path of ToMoE's MLP in its steps.
    """
    groups = [folders] if setup.is_interleaved else [{name: folder} for name, folder in folders.items()]
    sizes = {"decode": setup.batches, "prefill": setup.prompts}
    timed = [(part, size) for part in ("decode", "prefill") if part in parts for size in sizes[part]]
    samples: dict[tuple[str, int], Samples] = {}
    memory: dict[str, dict] = {}
    paths: dict[int, str] = {}
    results: dict[str, Any] = {}
    for group in groups:
        with start_engines(group, setup) as (engines, loaded):
            print(f"started: {', '.join(engines)}", file=sys.stderr, flush=True)
            if "tomoe" in engines:
                steps = sorted({*setup.batches, *setup.prompts})
                paths = {size: engines["tomoe"].ask(path_of=size)["path"] for size in steps}
            for part, size in timed:
                seconds = samples.setdefault((part, size), {})
                seconds |= (sample_decode if part == "decode" else sample_prefill)(engines, setup, size)
                if seconds.keys() >= folders.keys():
                    row = {SIZE_NAMES[part]: size, "path": paths[size]} | rates(seconds, size)
                    results.setdefault(part, []).append(row)
                    print(_line(part, row), file=sys.stderr, flush=True)
            if "memory" in parts:
                memory |= read_memory(engines, loaded)
    if memory:
        results["memory"] = memory | memory_ratios(memory)
    return results


def sample_decode(engines: dict[str, Engine], setup: EngineSetup, batch: int, rounds: int = DECODE_ROUNDS) -> Samples:
    """Seconds per step while ``batch`` sequences get one token per step. The first round is a warm-up.

    On CPUs the engines alternate step by step, so that noise and phases of slow memory affect both alike. Every second
    step of the dense engine runs the norm that vLLM ships: both dense variants and ToMoE see the same lengths of
    context. On GPUs they alternate round by round, because vLLM schedules a step ahead there.
    """
    samples: Samples = {}
    steps = setup.decode_steps
    for round_ in range(rounds + 1):
        for name, engine in engines.items():
            answer = engine.ask(
                prompt_tokens=setup.decode_prompt, batch=batch, new_tokens=steps + 1, is_finished=not setup.is_stepwise
            )
            if round_ and not setup.is_stepwise:
                samples.setdefault(name, []).append(answer["rest_s"] / steps)
        for step in range(steps if setup.is_stepwise else 0):
            norm = setup.norms[step % len(setup.norms)]
            for name, engine in engines.items():
                answer = engine.ask(step=1, norm=norm)
                if round_:
                    samples.setdefault(_variant(name, norm, setup), []).append(answer["step_s"])
    return samples


def sample_prefill(
    engines: dict[str, Engine], setup: EngineSetup, length: int, rounds: int = PREFILL_ROUNDS
) -> Samples:
    """Seconds until one sequence of ``length`` tokens has its first new token. The first round is a warm-up."""
    samples: Samples = {}
    for round_ in range(rounds + 1):
        for norm, (name, engine) in product(setup.norms, engines.items()):
            if name == "tomoe" and norm != setup.norms[0]:
                continue  # ToMoE has its own norm
            answer = engine.ask(prompt_tokens=length, batch=1, new_tokens=1, norm=norm)
            if round_:
                samples.setdefault(_variant(name, norm, setup), []).append(answer["first_s"])
    return samples


def _variant(engine: str, norm: str, setup: EngineSetup) -> str:
    """Name in the results: ToMoE runs its own norm whatever is selected."""
    return "dense_as_shipped" if (engine, norm) == ("dense", "shipped") and len(setup.norms) > 1 else engine


def rates(seconds: Samples, num_tokens: int) -> dict:
    """Tokens per second of each variant, and the speed of ToMoE relative to dense."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    row = {
        "tokens_per_s": {name: summary([num_tokens / s for s in values]) for name, values in seconds.items()},
        "ratio": medians["dense"] / medians["tomoe"],
    }
    if "dense_as_shipped" in medians:
        row["ratio_to_dense_as_shipped"] = medians["dense_as_shipped"] / medians["tomoe"]
    return row


def read_memory(engines: dict[str, Engine], loaded: dict[str, dict]) -> dict[str, dict]:
    """Bytes of each engine after loading, now, and once what is free was returned to the system."""
    now = {name: engine.ask() for name, engine in engines.items()}
    trimmed = {name: engine.ask(trim=1) for name, engine in engines.items()}
    return {name: {"loaded": loaded[name], "now": now[name], "trimmed": trimmed[name]} for name in engines}


def memory_ratios(memory: dict[str, dict]) -> dict[str, float]:
    """Memory of ToMoE relative to dense: of the process on CPUs, of torch.cuda on GPUs (KV cache included)."""
    held = "allocated" if "allocated_bytes" in memory["dense"]["now"] else "resident"
    titles = {
        ("loaded", held): f"{held} after loading",
        ("now", held): f"{held} at the end",
        ("trimmed", held): f"{held} at the end, trimmed",
        ("now", "peak"): "peak",
    }
    if held == "allocated":
        del titles["trimmed", held]
    ratios = {
        f"{when}_{what}_ratio": memory["tomoe"][when][f"{what}_bytes"] / memory["dense"][when][f"{what}_bytes"]
        for when, what in titles
    }
    parts = [f"{title} {ratio:.3f} x" for title, ratio in zip(titles.values(), ratios.values(), strict=True)]
    print(f"memory of ToMoE relative to dense: {', '.join(parts)}", file=sys.stderr)
    return ratios


def _line(part: str, row: dict) -> str:
    title = f"decode, batch {row['batch']}" if part == "decode" else f"prefill of {row['prompt_tokens']} tokens"
    speeds = {name: value["median"] for name, value in row["tokens_per_s"].items()}
    line = f"{title}: dense {speeds['dense']:.1f}, ToMoE {speeds['tomoe']:.1f} tokens/s ({row['ratio']:.2f} x)"
    if "dense_as_shipped" in speeds:
        shipped = f"{speeds['dense_as_shipped']:.1f} ({row['ratio_to_dense_as_shipped']:.2f} x)"
        line += f"; dense with vLLM's own norm {shipped}"
    return f"{line}; {row['path']}"
