"""Dense and ToMoE end to end in vLLM: decode, prefill and memory of two engines that run alternately.

The baseline is the dense model with the RMSNorm kernel that ToMoE runs, so that a ratio measures the method and not the
norm. The dense model as vLLM ships it, whose norm is plain torch on CPUs, is measured beside it.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tomoe_vllm.diagnostics.bench.measure import summary

BATCHES = (1, 4, 16, 64)
PROMPTS = (256, 1024)
DECODE_PROMPT, DECODE_STEPS = 16, 16
NORMS = ("compiled", "shipped")
"""RMSNorm kernels of the dense engine; see ``worker.make_norm_switchable``."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
"""glibc keeps freed memory: mapping and zeroing each large temporary anew would slow the dense model most."""


class Engine:
    """A process of ``worker.py`` with one model."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tomoe_vllm.diagnostics.bench.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ALLOCATOR,
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
def start_engines(folders: dict[str, Path]) -> Iterator[tuple[dict[str, Engine], dict[str, dict]]]:
    """Engines by name, started one after the other, and the memory of each after loading."""
    engines: dict[str, Engine] = {}
    try:
        loaded = {}
        for name, folder in folders.items():
            engines[name] = Engine(folder)
            loaded[name] = engines[name].answer()
        yield engines, loaded
    finally:
        for engine in engines.values():
            engine.process.kill()
            engine.process.wait()


def bench_decode(engines: dict[str, Engine], rounds: int = 4) -> list[dict]:
    """Tokens per second while ``batch`` sequences get one token per step.

    The engines alternate step by step, so that noise and phases of slow memory affect both alike. Every second step of
    the dense engine runs the norm that vLLM ships: both dense variants and ToMoE see the same lengths of context.
    """
    rows = []
    for batch in BATCHES:
        seconds = _no_samples()
        for round_ in range(rounds + 1):
            for engine in engines.values():
                engine.ask(prompt_tokens=DECODE_PROMPT, batch=batch, new_tokens=DECODE_STEPS + 1)
            for step in range(DECODE_STEPS):
                norm = NORMS[step % len(NORMS)]
                for name, engine in engines.items():
                    answer = engine.ask(step=1, norm=norm)
                    if round_:  # round 0 warms up
                        seconds[_variant(name, norm)].append(answer["step_s"])
        rows.append({"batch": batch} | _rates(seconds, batch))
        print(_line(f"decode, batch {batch}", rows[-1]), file=sys.stderr, flush=True)
    return rows


def bench_prefill(engines: dict[str, Engine], rounds: int = 6) -> list[dict]:
    """Prompt tokens per second up to the first new token of one sequence."""
    rows = []
    for length in PROMPTS:
        seconds = _no_samples()
        for round_ in range(rounds + 1):
            for norm, (name, engine) in product(NORMS, engines.items()):
                if (name, norm) == ("tomoe", "shipped"):
                    continue  # ToMoE has its own norm
                answer = engine.ask(prompt_tokens=length, batch=1, new_tokens=1, norm=norm)
                if round_:
                    seconds[_variant(name, norm)].append(answer["first_s"])
        rows.append({"prompt_tokens": length} | _rates(seconds, length))
        print(_line(f"prefill of {length} tokens", rows[-1]), file=sys.stderr, flush=True)
    return rows


def _variant(engine: str, norm: str) -> str:
    """Name in the results: ToMoE runs the compiled norm whatever is selected."""
    return "dense_as_shipped" if (engine, norm) == ("dense", "shipped") else engine


def _no_samples() -> dict[str, list[float]]:
    return {"dense": [], "tomoe": [], "dense_as_shipped": []}


def _rates(seconds: dict[str, list[float]], num_tokens: int) -> dict:
    rates = {name: summary([num_tokens / s for s in values]) for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_per_s": rates,
        "ratio": medians["dense"] / medians["tomoe"],
        "ratio_to_dense_as_shipped": medians["dense_as_shipped"] / medians["tomoe"],
    }


def bench_memory(engines: dict[str, Engine], loaded: dict[str, dict]) -> dict:
    """Bytes of each process: after loading, now, and once what is free (see ``ALLOCATOR``) was returned."""
    now = {name: engine.ask() for name, engine in engines.items()}
    trimmed = {name: engine.ask(trim=1) for name, engine in engines.items()}
    memory = {name: {"loaded": loaded[name], "now": now[name], "trimmed": trimmed[name]} for name in engines}
    ratios = {
        f"{when}_{what}_ratio": memory["tomoe"][when][f"{what}_bytes"] / memory["dense"][when][f"{what}_bytes"]
        for when, what in (("loaded", "resident"), ("now", "resident"), ("trimmed", "resident"), ("now", "peak"))
    }
    titles = ("resident after loading", "resident at the end", "resident at the end, trimmed", "peak")
    parts = [f"{title} {ratio:.3f} x" for title, ratio in zip(titles, ratios.values(), strict=True)]
    print(f"memory of ToMoE relative to dense: {', '.join(parts)}", file=sys.stderr)
    return memory | ratios


def _line(title: str, row: dict) -> str:
    dense, tomoe, shipped = (value["median"] for value in row["tokens_per_s"].values())
    return (
        f"{title}: dense {dense:.1f}, ToMoE {tomoe:.1f} tokens/s ({row['ratio']:.2f} x); "
        f"dense with vLLM's own norm {shipped:.1f} ({row['ratio_to_dense_as_shipped']:.2f} x)"
    )
