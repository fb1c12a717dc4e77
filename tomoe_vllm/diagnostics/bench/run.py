"""The command ``tomoe bench``: makes the models, runs the measurements, writes JSON and a plot."""

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tomoe_vllm import __version__
from tomoe_vllm.diagnostics.bench.measure import machine
from tomoe_vllm.diagnostics.bench.shapes import shape_of
from tomoe_vllm.hf.register import register_configs

PARTS = ("op", "decode", "prefill", "memory")
BASELINE = "the dense model with vLLM's compiled RMSNorm, as ToMoE runs it"


def bench(only: list[str] | None, shape: str, model: Path | None, tomoe: Path | None, out: Path | None) -> dict:
    """Measure the named parts and return the results, which ``tomoe bench`` prints as JSON.

    Args:
        only: parts to measure, of :data:`PARTS`; default all. ``op`` always measures ``shape``.
        shape: name of the random model to measure.
        model: dense checkpoint to measure instead.
        tomoe: ToMoE checkpoint of ``model``; default one with random gates at p = 0.5.
        out: new folder for bench.json and bench.png.

    Raises:
        ValueError: unknown part or shape, ``tomoe`` without ``model``, or ``out`` exists.
    """
    parts = only or list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"--only is {part!r}; it must be one of {', '.join(PARTS)}")
    named = shape_of(shape)
    if tomoe is not None and model is None:
        raise ValueError("--tomoe needs the dense model it was made from; add --model")
    if out is not None and out.exists():
        raise ValueError(f"--out {out} already exists; use a new folder")
    results: dict[str, Any] = {"version": __version__, "model": str(model) if model else shape, "active_ratio": 0.5}
    results["machine"] = machine()
    if tomoe is not None:
        register_configs()
        results["active_ratio"] = AutoConfig.from_pretrained(tomoe).active_ratio
    if "op" in parts:
        from tomoe_vllm.diagnostics.bench.op import bench_op

        print(f"MLP op alone, shape {shape}, per layer; in brackets the speed relative to dense", file=sys.stderr)
        results["op"] = {"shape": shape} | bench_op(named)
    if set(parts) - {"op"}:
        _bench_engines(results, parts, shape, model, tomoe)
    if out is not None:
        out.mkdir(parents=True)
        (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
        from tomoe_vllm.diagnostics.bench.plot import write_plot

        write_plot(results, out / "bench.png")
    return results


def _bench_engines(results: dict, parts: list[str], shape: str, model: Path | None, tomoe: Path | None) -> None:
    from tomoe_vllm.diagnostics.bench import engine
    from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tomoe-bench-")))
        if model is None:
            model = folder / "dense"
            write_dense(shape_of(shape), model)
        if tomoe is None:
            tomoe = folder / "tomoe"
            write_tomoe(model, tomoe)
        results["baseline"] = BASELINE
        print(f"in vLLM, float32; x is the speed of ToMoE relative to {BASELINE}", file=sys.stderr)
        engines, loaded = stack.enter_context(engine.start_engines({"dense": model, "tomoe": tomoe}))
        if "decode" in parts:
            results["decode"] = engine.bench_decode(engines)
        if "prefill" in parts:
            results["prefill"] = engine.bench_prefill(engines)
        if "memory" in parts:
            results["memory"] = engine.bench_memory(engines, loaded)
