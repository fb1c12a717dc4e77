"""Dense and ToMoE end to end in vLLM: decode, prefill and memory, two engines that take turns."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tomoe_vllm.diagnostics.bench.measure import summary

BATCHES = (1, 4, 16, 64)
PROMPTS = (256, 1024)
DECODE_PROMPT, DECODE_STEPS = 16, 16
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
"""glibc keeps freed memory: else each large temporary is mapped and zeroed anew, which slows the dense model most."""


class Engine:
    """A worker process with one model; see worker.py."""

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

    def ask(self, **task: int) -> dict:
        """Send a measurement and wait for its answer."""
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


def bench_decode(engines: dict[str, Engine], rounds: int = 3) -> list[dict]:
    """Tokens per second while ``batch`` sequences get one token per step. The engines take turns step by step, so that
    what disturbs the machine, or slows its memory for a while, hits them alike.
    """
    rows = []
    for batch in BATCHES:
        steps: dict[str, list[float]] = {name: [] for name in engines}
        for round_ in range(rounds + 1):
            for engine in engines.values():
                engine.ask(prompt_tokens=DECODE_PROMPT, batch=batch, new_tokens=DECODE_STEPS + 1)
            for _ in range(DECODE_STEPS):
                for name, engine in engines.items():
                    answer = engine.ask(step=1)
                    if round_:  # the first warms up
                        steps[name].append(answer["step_s"])
        rows.append({"batch": batch} | _rates(steps, batch))
        print(_line(f"decode, batch {batch}", rows[-1]), file=sys.stderr, flush=True)
    return rows


def bench_prefill(engines: dict[str, Engine], rounds: int = 7) -> list[dict]:
    """Prompt tokens per second up to the first token of one sequence."""
    rows = []
    for length in PROMPTS:
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for round_ in range(rounds + 1):
            for name, engine in engines.items():
                answer = engine.ask(prompt_tokens=length, batch=1, new_tokens=1)
                if round_:
                    seconds[name].append(answer["first_s"])
        rows.append({"prompt_tokens": length} | _rates(seconds, length))
        print(_line(f"prefill of {length}", rows[-1]), file=sys.stderr, flush=True)
    return rows


def _rates(seconds: dict[str, list[float]], num_tokens: int) -> dict:
    rates = {name: summary([num_tokens / s for s in values]) for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"tokens_per_s": rates, "ratio": medians["dense"] / medians["tomoe"]}


def bench_memory(engines: dict[str, Engine], loaded: dict[str, dict]) -> dict:
    """Bytes of each process after loading, now, and without what is free (``ALLOCATOR`` keeps that)."""
    now = {name: engine.ask() for name, engine in engines.items()}
    trimmed = {name: engine.ask(trim=1) for name, engine in engines.items()}
    memory = {name: {"loaded": loaded[name], "now": now[name], "trimmed": trimmed[name]} for name in engines}
    ratios = {
        f"{when}_{what}_ratio": memory["tomoe"][when][f"{what}_bytes"] / memory["dense"][when][f"{what}_bytes"]
        for when, what in (("loaded", "resident"), ("now", "resident"), ("trimmed", "resident"), ("now", "peak"))
    }
    print(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in ratios.items()), file=sys.stderr)
    return memory | ratios


def _line(title: str, row: dict) -> str:
    rates = ", ".join(f"{name} {value['median']:.1f}" for name, value in row["tokens_per_s"].items())
    return f"{title}: {rates} tokens/s ({row['ratio']:.2f} x)"
