"""Is a commit slower in vLLM? Run: python benchmarks/engine_versions.py 086951d . --model CHECKPOINT --batches 1 16

One engine for each commit (``.`` is the working tree) serves the same checkpoint on this CPU, in float32 or bfloat16.
The engines alternate step by step, and in each round another one is first: separate runs on one machine differ by more
than most changes. The worker of the working tree runs on each commit's package; 086951d is the oldest that it fits.
Prints the median step in milliseconds, and the median over rounds of each commit's time over that of the first one;
the last line is JSON.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

from tomoe_vllm.diagnostics.bench.engine import Engine, sample_decode, sample_prefill
from tomoe_vllm.diagnostics.bench.measure import machine
from tomoe_vllm.diagnostics.bench.setup import cpu_setup

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tomoe_vllm", "training", "serving")


def tree_of(version: str, folder: Path) -> Path:
    """A folder with the packages of a commit."""
    if version == ".":
        return ROOT
    archive = subprocess.run(["git", "archive", version, *PACKAGES], cwd=ROOT, capture_output=True)
    if archive.returncode:
        sys.exit(f"git has no {version!r}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def summarize(rounds: list[dict[str, list[float]]], first: str) -> dict[str, dict[str, float]]:
    """By commit: the median time in ms, and the median, least and greatest ratio of the rounds to ``first``."""
    result = {}
    for name in rounds[0]:
        medians = [statistics.median(samples[name]) for samples in rounds]
        ratios = [m / statistics.median(samples[first]) for m, samples in zip(medians, rounds, strict=True)]
        result[name] = {
            "ms": 1e3 * statistics.median(medians),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", help="commits; . is the working tree")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, ToMoE or dense")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--prompts", type=int, nargs="*", default=[256])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    setup = cpu_setup()
    setup = replace(setup, norms=("compiled",), arguments=setup.arguments | {"dtype": arguments.dtype})
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory(prefix="tomoe-versions-") as folder:
        worker = shutil.copy(ROOT / "tomoe_vllm/diagnostics/bench/worker.py", folder)  # not found beside its package
        try:
            for i, version in enumerate(arguments.versions):
                tree = tree_of(version, Path(folder, f"version{i}"))
                path = os.pathsep.join(str(tree / name) for name in ("", "training", "serving"))
                environment = setup.environment | {"PYTHONPATH": path}
                engines[version] = Engine(arguments.model, replace(setup, environment=environment), [str(worker)])
                engines[version].answer()
            rows = []
            sizes = [("decode", n) for n in arguments.batches] + [("prefill", n) for n in arguments.prompts]
            for part, size in sizes:
                sample = sample_decode if part == "decode" else sample_prefill
                rounds = []
                for round_ in range(arguments.rounds):
                    order = arguments.versions if round_ % 2 else arguments.versions[::-1]
                    rounds.append(sample({name: engines[name] for name in order}, setup, size, rounds=1))
                rows.append({"part": part, "size": size} | {"by": summarize(rounds, arguments.versions[0])})
                texts = [
                    f"{name} {v['ms']:.3f} ms ({v['ratio']:.3f} x; {v['low']:.3f} to {v['high']:.3f})"
                    for name, v in rows[-1]["by"].items()
                ]
                print(f"{part} {size}: {', '.join(texts)}", file=sys.stderr, flush=True)
        finally:
            for engine in engines.values():
                engine.process.kill()
                engine.process.wait()
    print(json.dumps({"machine": machine(), "dtype": arguments.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
