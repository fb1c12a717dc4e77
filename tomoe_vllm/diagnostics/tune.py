"""``tomoe tune``: measures from how many tokens the sparse kernels of the shared layout are worth it on this GPU.

For each kind of layer of a model (:class:`LayerShape`) and each number of tokens in :func:`token_counts`, it checks the
values of every execution path against the reference, and times it as a CUDA graph. The baseline is the dense MLP as
vLLM runs it: cuBLAS with W_down as [D, F], and one kernel for the activation. :func:`best` derives the thresholds, or
finds that the shared layout is not worth it, and the tables of ``kernels/expert_mlp/triton/dispatch.py`` store them.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.diagnostics.bench.shapes import shape_of
from tomoe_vllm.diagnostics.roofline import WORTH_IT, MLPShape
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import (
    DENSE_ONLY,
    NEVER,
    LayerShape,
    Thresholds,
    expert_mlp_cuda,
    write_table,
)
from tomoe_vllm.kernels.ops import ExpertTensors

FEW_TOKENS = tuple(range(1, 9))
"""Sizes at which gather is measured: it reads the rows of each token, so more are hopeless."""
MANY_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
"""Sizes at which grouped is measured: all rows of ``grouped_config``, and around the size that the cost model
predicts."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHARES = 8
"""Widths of experts are rounded up to a multiple of 1 / SHARES of the neurons: a model has other widths in each layer,
and a table of a wider expert serves narrower ones."""
BYTES_BETWEEN_REUSE = 512 << 20
"""Weights that a measurement reads before it reads the same ones again: several times the L2 cache of any GPU, as in a
model, whose other layers come in between."""
MIN_COPIES = 4
"""Layers per measurement, each with its own draw of the tokens' experts."""

Timer = Callable[[Sequence[Callable[[], Tensor]]], float]
"""Seconds of one call, from calls that run one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Layers that share one entry of a table. ``shape``: on one tensor-parallel rank."""

    shape: LayerShape
    activation: str
    has_bias: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """``seconds``: by path ("gather", "dense", "grouped", and "vllm" for the baseline) and number of tokens.
    ``failures``: by path and number of tokens, how the values differ from the reference."""

    seconds: dict[str, dict[int, float]]
    failures: dict[tuple[str, int], str]


def token_counts(max_tokens: int) -> list[int]:
    """Numbers of tokens to measure, up to and including ``max_tokens``."""
    return sorted({size for size in (*FEW_TOKENS, *MANY_TOKENS) if size < max_tokens} | {max_tokens})


def layer_kinds(model: Path | None, shape: str, tensor_parallel_size: int, dtype: str) -> list[LayerKind]:
    """The kinds of layers of ``model`` (dense or ToMoE), or of the shape of that name at p = 0.5.

    Raises ``ValueError`` for an unsupported model, or a tensor parallel size that does not divide the neurons.
    """
    if model is not None:
        from tomoe_vllm.diagnostics.doctor import model_layer

        mlp, activation, has_bias = model_layer(model)
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
    seconds, sizes = measurement.seconds, sorted(measurement.seconds["vllm"])
    if wrong := [key for key in measurement.failures if key[0] == "dense"]:
        return DENSE_ONLY, f"not worth it: the dense path is wrong at {wrong[0][1]} tokens"

    def is_better(path: str, size: int) -> bool:
        is_right = (path, size) not in measurement.failures
        return is_right and seconds[path].get(size, math.inf) < seconds["dense"][size]

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
    gains = {size: seconds["vllm"][size] / seconds[thresholds.path(size)][size] for size in sizes}
    slowest = min(sizes, key=lambda size: gains[size])
    fastest = max((s for s in sizes if thresholds.path(s) != "dense"), key=lambda size: gains[size], default=None)
    if fastest is None or gains[fastest] <= 1:
        return DENSE_ONLY, "not worth it: no sparse path is faster than vLLM's dense MLP"
    if gains[slowest] < WORTH_IT:
        return DENSE_ONLY, f"not worth it: {gains[slowest]:.2f} x vLLM's dense MLP at {slowest} tokens"
    return thresholds, f"{gains[fastest]:.2f} x vLLM's dense MLP at {fastest} tokens"


def tune(kinds: list[LayerKind], folder: Path | None, max_tokens: int) -> dict:
    """Measure every kind of layer on this GPU, and write its thresholds to the table in ``folder``.

    Returns the files, and per kind the thresholds, the reason, the seconds and the failed checks. Raises ``ValueError``
    without a GPU: CPUs have one path for every number of tokens.
    """
    if not torch.cuda.is_available():
        raise ValueError("tomoe tune needs a GPU; CPUs have one execution path for every number of tokens")
    files, results = set(), []
    for kind in kinds:
        measurement = measure(kind, token_counts(max_tokens), graph_seconds, "cuda")
        thresholds, reason = best(measurement)
        files.add(str(write_table(kind.shape, thresholds, folder)))
        failures = list(measurement.failures.values())
        print(f"experts of {kind.shape.width} of {kind.shape.num_neurons} neurons: {reason}", file=sys.stderr)
        shape = asdict(kind.shape) | {"dtype": str(kind.shape.dtype).removeprefix("torch.")}
        results.append(
            {"shape": shape, "reason": reason, "seconds": measurement.seconds, "failures": failures}
            | asdict(thresholds)
        )
    return {"files": sorted(files), "layers": results}


def measure(kind: LayerKind, sizes: Iterable[int], timer: Timer, device: str) -> Measurement:
    """Check and time every path at every size, on random layers."""
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
    layer = Layer.random(mlp, kind.activation, kind.has_bias, shape.dtype, device)
    # As in the model, where masks have its dtype.
    layer = replace(layer, weights=replace(layer.weights, masks=layer.weights.masks.to(shape.dtype)))
    copies = copies_of(layer.weights, max(MIN_COPIES, math.ceil(BYTES_BETWEEN_REUSE / mlp.weight_bytes)))
    transposed = [weights.down.T.contiguous() for weights in copies]  # [D, F], as vLLM stores W_down
    ones = torch.ones(1, shape.num_neurons, dtype=torch.uint8, device=device)
    generator = torch.Generator(device).manual_seed(0)
    result = Measurement(seconds={path: {} for path in ("vllm", "dense", "gather", "grouped")}, failures={})
    for size in sizes:
        x = torch.randn(size, shape.hidden_size, generator=generator, device=device).to(shape.dtype)
        ids = [torch.randint(shape.num_experts, (size,), generator=generator, device=device) for _ in copies]
        no_ids = torch.zeros_like(ids[0])
        for path in ("dense", "gather" if size in FEW_TOKENS else "grouped"):
            check = run_check(layer, path, size, "random", None)
            if not check.agrees:
                result.failures[path, size] = check.describe()
                print(check.describe(), file=sys.stderr)
            if check.error is None:
                calls = [partial(expert_mlp_cuda, x, own, w, path) for own, w in zip(ids, copies, strict=True)]
                result.seconds[path][size] = timer(calls)
        baseline = [partial(dense_mlp, x, w, d, no_ids, ones) for w, d in zip(copies, transposed, strict=True)]
        result.seconds["vllm"][size] = timer(baseline)
        print(f"{size} tokens measured", file=sys.stderr)
    return result


def copies_of(weights: ExpertTensors, number: int) -> list[ExpertTensors]:
    """``weights``, and ``number`` - 1 copies of it in other memory."""
    others = [replace(weights, up=weights.up.clone(), down=weights.down.clone()) for _ in range(number - 1)]
    return [weights, *others]


def dense_mlp(x: Tensor, weights: ExpertTensors, down: Tensor, no_ids: Tensor, ones: Tensor) -> Tensor:
    """The dense MLP of T tokens as vLLM runs it: two GEMMs of cuBLAS around one kernel for the activation.

    ``down``: W_down, [D, F]. ``no_ids`` [T] zeros and ``ones`` [1, F]: a mask that keeps all neurons, of one expert.
    """
    from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton

    projected = F.linear(x, weights.up, weights.up_bias)
    return F.linear(expert_activation_triton(projected, no_ids, ones, weights.activation), down)


def graph_seconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Seconds of one call: all of them in one CUDA graph, its median time over their number."""
    from tomoe_vllm.diagnostics.kernel_checks import capture, median_ms

    def run() -> Tensor:
        for call in calls:
            output = call()
        return output

    graph, _ = capture(run)
    return 1e-3 * median_ms(graph) / len(calls)
