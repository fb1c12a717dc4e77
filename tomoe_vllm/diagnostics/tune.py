"""``tomoe tune``: measures from how many tokens the sparse kernels of the shared layout are worth it on this GPU.

For each kind of layer of a model (:class:`LayerShape`) and each number of tokens in :func:`token_counts`, it checks the
values of every execution path against the reference, and times it as a CUDA graph. The baseline is the dense MLP as
vLLM runs it: cuBLAS with W_down as [D, F], and one kernel for the activation. :func:`best` derives the thresholds, or
finds that the shared layout is not worth it, and the tables of ``kernels/expert_mlp/triton/dispatch.py`` store them.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tomoe_vllm.diagnostics.bench.shapes import shape_of
from tomoe_vllm.diagnostics.device import CudaDevice, Device
from tomoe_vllm.diagnostics.layers import layer_of
from tomoe_vllm.diagnostics.roofline import WORTH_IT, MLPShape
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import (
    DENSE_ONLY,
    NEVER,
    LayerShape,
    Thresholds,
    write_table,
)

FEW_TOKENS = tuple(range(1, 9))
"""Sizes at which gather is measured: it reads the rows of each token, so more are hopeless."""
MANY_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
"""Sizes at which grouped is measured: all rows of ``grouped_config``, and around the size that the cost model
predicts."""
NUM_TOKENS = tuple(size for size in (*FEW_TOKENS, *MANY_TOKENS) if size <= 8192)
"""Sizes that are measured by default; ``tomoe doctor`` checks all of them."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHARES = 8
"""Widths of experts are rounded up to a multiple of 1 / SHARES of the neurons: a model has other widths in each layer,
and a table of a wider expert serves narrower ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Layers that share one entry of a table. ``shape``: on one tensor-parallel rank."""

    shape: LayerShape
    activation: str
    has_bias: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Results by path ("gather", "dense" and "grouped") and number of tokens.

    ``ms``: milliseconds, also of the baseline ("vllm"). ``failures``: how the values differ from the reference.
    """

    ms: dict[str, dict[int, float]]
    failures: dict[tuple[str, int], str]


def token_counts(max_tokens: int) -> list[int]:
    """Numbers of tokens to measure, up to and including ``max_tokens``."""
    return sorted({size for size in (*FEW_TOKENS, *MANY_TOKENS) if size < max_tokens} | {max_tokens})


def layer_kinds(model: Path | None, shape: str, tensor_parallel_size: int, dtype: str) -> list[LayerKind]:
    """The kinds of layers of ``model`` (dense or ToMoE), or of the shape of that name at p = 0.5.

    Raises ``ValueError`` for an unsupported model, or a tensor parallel size that does not divide the neurons.
    """
    if model is not None:
        layer = layer_of(model)
        mlp, activation, has_bias = layer.mlp, layer.activation, layer.has_bias
        config = json.loads((model / "config.json").read_text())
        widths = config.get("expert_intermediate_sizes") or [mlp.width]
    else:
        sizes = shape_of(shape)
        mlp = MLPShape(hidden_size=sizes.hidden_size, num_neurons=sizes.intermediate_size, width=sizes.expert_width)
        activation, has_bias, widths = "silu", False, [sizes.expert_width]
    if mlp.num_neurons % tensor_parallel_size:
        raise ValueError(
            f"tensor parallel size {tensor_parallel_size} does not divide intermediate_size {mlp.num_neurons}"
        )
    num_neurons = mlp.num_neurons // tensor_parallel_size
    shares = {math.ceil(SHARES * width / mlp.num_neurons) for width in widths}
    return [
        LayerKind(
            shape=LayerShape(
                hidden_size=mlp.hidden_size,
                num_neurons=num_neurons,
                num_experts=mlp.num_experts,
                width=math.ceil(num_neurons * share / SHARES),
                num_matrices=mlp.num_matrices,
                dtype=DTYPES[dtype],
            ),
            activation=activation,
            has_bias=has_bias,
        )
        for share in sorted(shares)
    ]


def best(measurement: Measurement) -> tuple[Thresholds, str]:
    """Thresholds, and in a few words why.

    A path is used only where its values agree with the reference and it was faster than the dense path, at that size
    and at all measured sizes on its side: gather at all smaller ones, grouped at all larger ones. The result is
    ``DENSE_ONLY`` unless a sparse path beats vLLM's dense MLP somewhere and no size is slower than ``WORTH_IT`` allows.
    """
    ms, sizes = measurement.ms, sorted(measurement.ms["vllm"])
    if wrong := [key for key in measurement.failures if key[0] == "dense"]:
        return DENSE_ONLY, f"not worth it: the dense path is wrong at {wrong[0][1]} tokens"

    def is_better(path: str, size: int) -> bool:
        is_right = (path, size) not in measurement.failures
        return is_right and ms[path].get(size, math.inf) < ms["dense"][size]

    gather, grouped = 0, NEVER
    for size in sizes:
        if not is_better("gather", size):
            break
        gather = size
    for size in reversed(sizes):
        if not is_better("grouped", size) or size <= gather:
            break
        grouped = size
    thresholds = Thresholds(gather_tokens=gather, grouped_tokens=grouped, max_tokens=sizes[-1])
    gains = {size: ms["vllm"][size] / ms[thresholds.path(size)][size] for size in sizes}
    slowest = min(sizes, key=lambda size: gains[size])
    fastest = max((s for s in sizes if thresholds.path(s) != "dense"), key=lambda size: gains[size], default=None)
    if fastest is None or gains[fastest] <= 1:
        return DENSE_ONLY, "not worth it: no sparse path is faster than vLLM's dense MLP"
    if gains[slowest] < WORTH_IT:
        return DENSE_ONLY, f"not worth it: {gains[slowest]:.2f} x vLLM's dense MLP at {slowest} tokens"
    return thresholds, f"{gains[fastest]:.2f} x vLLM's dense MLP at {fastest} tokens"


def tune(kinds: list[LayerKind], folder: Path | None, max_tokens: int) -> dict:
    """Measure every kind of layer on this GPU, and write its thresholds to the table in ``folder``.

    Returns the files, and per kind the thresholds, the reason, the milliseconds and the failed checks. Raises
    ``ValueError`` without a GPU: CPUs have one path for every number of tokens.
    """
    if not torch.cuda.is_available():
        raise ValueError("tomoe tune needs a GPU; CPUs have one execution path for every number of tokens")
    files, results, device = set(), [], CudaDevice()
    for kind in kinds:
        measurement = measure(kind, token_counts(max_tokens), device)
        thresholds, reason = best(measurement)
        files.add(str(write_table(kind.shape, thresholds, folder)))
        failures = list(measurement.failures.values())
        print(f"experts of {kind.shape.width} of {kind.shape.num_neurons} neurons: {reason}", file=sys.stderr)
        shape = asdict(kind.shape) | {"dtype": str(kind.shape.dtype).removeprefix("torch.")}
        results.append(
            {"shape": shape, "reason": reason, "ms": measurement.ms, "failures": failures} | asdict(thresholds)
        )
    return {"files": sorted(files), "layers": results}


def measure(kind: LayerKind, sizes: Iterable[int], device: Device) -> Measurement:
    """Check and time every path at every size, on a random layer whose tokens are spread evenly over the experts."""
    from tomoe_vllm.diagnostics.kernel_checks import Layer, run_check

    shape = kind.shape
    mlp = MLPShape(
        hidden_size=shape.hidden_size,
        num_neurons=shape.num_neurons,
        width=shape.width,
        num_experts=shape.num_experts,
        num_matrices=shape.num_matrices,
        itemsize=shape.dtype.itemsize,
    )
    layer = Layer.random(mlp, kind.activation, kind.has_bias, shape.dtype, device.type)
    # As in the model, where masks have its dtype.
    layer = replace(layer, weights=replace(layer.weights, masks=layer.weights.masks.to(shape.dtype)))
    result = Measurement(ms={path: {} for path in ("vllm", "dense", "gather", "grouped")}, failures={})
    for size in sizes:
        for path in ("dense", "gather" if size in FEW_TOKENS else "grouped"):
            check = run_check(layer, path, size, "evenly", device)
            if not check.agrees:
                result.failures[path, size] = check.describe()
                print(check.describe(), file=sys.stderr)
            if check.ms is not None and check.dense_ms is not None:
                result.ms[path][size], result.ms["vllm"][size] = check.ms, check.dense_ms
        print(f"{size} tokens measured", file=sys.stderr)
    return result
