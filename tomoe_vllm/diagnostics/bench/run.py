"""What ``tomoe bench`` does: models, engines, tables, one JSON object, a plot."""

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tomoe_vllm import __version__
from tomoe_vllm.diagnostics.bench.shapes import shape_of
from tomoe_vllm.hf.register import register_configs

PARTS = ("op", "decode", "prefill", "memory")


def bench(only: list[str] | None, shape: str, model: Path | None, tomoe: Path | None, out: Path | None) -> dict:
    """Run the named parts (default: all), on a random model of ``shape`` or on the dense folder ``model``.

    ``tomoe``: ToMoE checkpoint of ``model``; without it, one with random gates at p = 0.5. ``out``: folder for
    bench.json and bench.png.

    Raises ``ValueError`` for an unknown part or shape.
    """
    parts = only or list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"--only is {part!r}; it must be one of {', '.join(PARTS)}")
    named = shape_of(shape)
    if tomoe is not None and model is None:
        raise ValueError("--tomoe needs the dense model it was made from; name it with --model")
    if out is not None and out.exists():
        raise ValueError(f"{out} exists; name a folder that does not")
    results: dict[str, Any] = {"version": __version__, "model": str(model) if model else shape, "active_ratio": 0.5}
    if tomoe is not None:
        register_configs()
        results["active_ratio"] = AutoConfig.from_pretrained(tomoe).active_ratio
    if "op" in parts:
        from tomoe_vllm.diagnostics.bench.op import bench_op

        print(f"the MLP op alone, shape {shape}", file=sys.stderr)
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
        engines, loaded = stack.enter_context(engine.start_engines({"dense": model, "tomoe": tomoe}))
        if "decode" in parts:
            results["decode"] = engine.bench_decode(engines)
        if "prefill" in parts:
            results["prefill"] = engine.bench_prefill(engines)
        if "memory" in parts:
            results["memory"] = engine.bench_memory(engines, loaded)
