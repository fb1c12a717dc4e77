"""The command ``tomoe bench``: makes the models, runs the measurements, writes JSON and a plot."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from tomoe_vllm import __version__
from tomoe_vllm.diagnostics.bench import setup
from tomoe_vllm.diagnostics.bench.measure import machine
from tomoe_vllm.diagnostics.bench.prediction import not_expected_faster, predict
from tomoe_vllm.diagnostics.bench.shapes import Shape, shape_of
from tomoe_vllm.hf.register import register_configs

PARTS = ("op", "decode", "prefill", "memory")


def bench(
    only: list[str] | None,
    shape: str,
    model: Path | None,
    tomoe: Path | None,
    out: Path | None,
    device: str | None = None,
    order: str = "auto",
) -> dict:
    """Measure the named parts and return the results, which ``tomoe bench`` prints as JSON.

    Args:
        only: parts to measure, of :data:`PARTS`; default all. ``op`` always measures ``shape``.
        shape: name of the random model to measure.
        model: dense checkpoint to measure instead.
        tomoe: ToMoE checkpoint of ``model``; default one with random gates at p = 0.5.
        out: new folder for bench.json and bench.png.
        device: "cpu" or "cuda"; default the one that vLLM runs on here.
        order: of the two engines: "interleaved", "sequential", or "auto" (see ``setup.py``).

    Raises:
        ValueError: unknown part or shape, ``tomoe`` without ``model``, ``out`` exists, no such device here, or a model
            that does not fit on the GPU.
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
    device = setup.choose_device(device)
    results: dict[str, Any] = {"version": __version__, "model": str(model) if model else shape, "active_ratio": 0.5}
    results |= {"machine": machine(device), "device": device, "dtype": setup.DTYPES[device]}
    if tomoe is not None:
        register_configs()
        results["active_ratio"] = AutoConfig.from_pretrained(tomoe).active_ratio
    if "op" in parts:
        print(f"MLP op alone, shape {shape}, per layer; in brackets the speed relative to dense", file=sys.stderr)
        results["op"] = {"shape": shape} | _bench_op(device, named)
    if set(parts) - {"op"}:
        results |= _bench_engines(parts, device, order, shape, model, tomoe)
        for line in not_expected_faster(results):
            print(line, file=sys.stderr)
    if out is not None:
        out.mkdir(parents=True)
        (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
        from tomoe_vllm.diagnostics.bench.plot import write_plot

        write_plot(results, out / "bench.png")
    return results


def _bench_op(device: str, shape: Shape) -> dict:
    if device == "cuda":
        from tomoe_vllm.diagnostics.bench.op_gpu import bench_op_gpu

        results = bench_op_gpu(shape)
        torch.cuda.empty_cache()  # the engines of the other parts need the memory
        return results
    from tomoe_vllm.diagnostics.bench.op import bench_op

    return bench_op(shape)


def _bench_engines(
    parts: list[str], device: str, order: str, shape: str, model: Path | None, tomoe: Path | None
) -> dict[str, Any]:
    from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe
    from tomoe_vllm.diagnostics.bench.engine import bench_engines

    with tempfile.TemporaryDirectory(prefix="tomoe-bench-") as folder:
        if model is None:
            model = Path(folder, "dense")
            write_dense(shape_of(shape), model)
        if tomoe is None:
            tomoe = Path(folder, "tomoe")
            write_tomoe(model, tomoe)
        folders = {"dense": model, "tomoe": tomoe}
        engines = setup.engine_setup(device, folders, order)
        how = "alternate" if engines.is_interleaved else "run one after the other"
        print(
            f"in vLLM on {device}, {setup.DTYPES[device]}; the engines {how}; x is the speed of ToMoE relative to "
            f"{engines.baseline}",
            file=sys.stderr,
        )
        facts = {key: getattr(engines, key) for key in ("baseline", "is_interleaved", "kv_cache_bytes")}
        results = facts | bench_engines(folders, parts, engines)
        if device == "cuda":
            register_configs()
            predict(results, AutoConfig.from_pretrained(tomoe), torch.cuda.get_device_name())
        return results
