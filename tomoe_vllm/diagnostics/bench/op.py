"""The MLP op alone on CPUs: ToMoE's, the dense MLP and vLLM's fused MoE.

dense   what vLLM runs for a dense model: oneDNN on packed weights (UnquantizedLinearMethod) and silu_and_mul
shared  tomoe::expert_mlp on one copy of the weights
masked  the dense path with the expert's mask applied to the activation (the layout for quantized weights and LoRA)
fused   vLLM's CPU fused MoE (isa "vec") over materialised experts, which take N/2 times the memory

Consecutive calls use different layers, as in a model, since a single layer would stay in the caches. The paths are
never at the same layer: some share their weights and would find them in a cache that another path has filled. Each
call draws the experts of its tokens anew, with the same draws for every path. The limit is max(bytes of the union of
the experts touched / bandwidth, operations / GEMM rate).
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.diagnostics.bench.measure import gemm_rate, interleave, read_bandwidth, summary
from tomoe_vllm.diagnostics.bench.shapes import Shape
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_activation import expert_activation
from tomoe_vllm.kernels.expert_mlp import ExpertWeights, expert_mlp
from tomoe_vllm.kernels.expert_mlp.weight_layout import empty_panels, empty_rows, neuron_lists, neuron_order

NUM_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)
NUM_DRAWS = 32
"""Draws of the tokens' experts; they differ in how many neurons the experts share and how contiguous these are."""
WALKED_BYTES = 400 << 20
"""Dense bytes of all layers in use: many times the size of a core's caches."""


class Layer:
    """One layer with random weights, in the form that each path needs. All paths: [T, D] float32 -> [T, D] float32."""

    def __init__(self, shape: Shape, generator: torch.Generator, paths: tuple[str, ...]) -> None:
        from tomoe_vllm.compat import ops

        hidden, neurons, width = shape.hidden_size, shape.intermediate_size, shape.expert_width
        self.up = empty_rows(2 * neurons, hidden).normal_(0, hidden**-0.5, generator=generator)
        self.down = empty_panels(neurons, hidden).normal_(0, neurons**-0.5, generator=generator)
        order = torch.rand(shape.num_experts, neurons, generator=generator).argsort(dim=1)
        masks = torch.zeros(shape.num_experts, neurons).scatter_(1, order[:, :width], 1.0)
        self.masks = masks[:, neuron_order(masks)]  # random weights need not be reordered with them
        self.neuron_ids, self.widths = neuron_lists(self.masks)
        lists = self.masks, self.neuron_ids, self.widths
        self.weights = ExpertWeights(self.up, None, self.down, *lists, "silu")
        down = self.down.flatten(1)
        self.packed_up = ops.create_onednn_mm(self.up.contiguous().t(), 32)
        self.packed_down = ops.create_onednn_mm(down, 32)
        if "fused" in paths:
            padding = -width % 32  # the kernel needs whole multiples; vLLM pads in the same way
            gate, up, down = (
                F.pad(torch.stack([rows[ids] for ids in self.neuron_ids.long()]), (0, 0, 0, padding))
                for rows in (self.up[:neurons], self.up[neurons:], down)
            )
            self.w13 = ops.cpu_prepack_moe_weight(torch.cat([gate, up], dim=1), "vec")
            self.w2 = ops.cpu_prepack_moe_weight(down.mT.contiguous(), "vec")

    def dense(self, x: Tensor, expert_ids: Tensor | None = None) -> Tensor:
        from tomoe_vllm.compat import ops

        projected = ops.onednn_mm(self.packed_up, x, None)
        hidden = projected.new_empty(len(x), projected.shape[1] // 2)
        torch.ops._C.silu_and_mul(hidden, projected)
        return ops.onednn_mm(self.packed_down, hidden, None)

    def masked(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        from tomoe_vllm.compat import ops

        projected = ops.onednn_mm(self.packed_up, x, None)
        return ops.onednn_mm(self.packed_down, expert_activation(projected, expert_ids, self.masks, "silu"), None)

    def shared(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        return expert_mlp(x, expert_ids, self.weights)

    def fused(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        from tomoe_vllm.compat import ops

        output = torch.empty_like(x)
        weights = torch.ones(len(x), 1)
        ops.cpu_fused_moe(output, x, self.w13, self.w2, None, None, weights, expert_ids[:, None].int(), "silu", "vec")
        return output


Call = Callable[[Layer], Tensor]


def draw_experts(num_experts: int, num_tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Random experts of ``num_tokens`` tokens, each [T] int64; consecutive calls of a path cycle through them."""
    options = {"generator": generator, "device": generator.device}
    return [torch.randint(num_experts, (num_tokens,), **options) for _ in range(NUM_DRAWS)]


def call_with(path: Callable[[Any, Tensor, Tensor], Tensor], x: Tensor, draws: list[Tensor]) -> Callable[[Any], Tensor]:
    """``path(layer, x, expert_ids)`` with the next draw at each call."""
    drawn = cycle(draws)
    return lambda layer: path(layer, x, next(drawn))


def make_layers(shape: Shape, paths: tuple[str, ...]) -> list[Layer]:
    """Layers of :data:`WALKED_BYTES` in all, at most as many as the model has."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    generator = torch.Generator().manual_seed(0)
    count = max(1, min(shape.num_layers, round(WALKED_BYTES / shape.mlp_bytes)))
    return [Layer(shape, generator, paths) for _ in range(count)]


def limit_seconds(
    shape: Shape, layer: Any, expert_ids: Tensor, bandwidth: float, rate: float, itemsize: int = 4
) -> float:
    """The time that no implementation can beat on this machine, for these tokens and the layer's experts."""
    union = int((layer.masks[expert_ids.unique()].sum(dim=0) > 0).sum())
    num_bytes = 3 * itemsize * shape.hidden_size * union
    operations = 2 * 3 * shape.hidden_size * float(layer.widths[expert_ids].sum())
    return max(num_bytes / bandwidth, operations / rate)


def bench_op(shape: Shape, paths: tuple[str, ...] = ("dense", "shared", "masked", "fused")) -> dict:
    """Milliseconds of each path at every number of tokens, measured once all paths gave the same result.

    Raises ``RuntimeError`` without a C++ compiler, or if the result of a path differs.
    """
    if not build.load():
        raise RuntimeError("the CPU kernels could not be compiled, so there is nothing to compare; install g++")
    bandwidth, rate = read_bandwidth(), gemm_rate()
    layers = make_layers(shape, paths)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator)
        draws = draw_experts(shape.num_experts, num_tokens, generator)
        calls: dict[str, Call] = {path: call_with(getattr(Layer, path), x, draws) for path in paths}
        check(calls, layers[0])
        samples = interleave(walk(calls, layers), rounds=rounds_of(shape, num_tokens), warm_up=2)
        row = {name: summary(values, 1e3) for name, values in samples.items()}
        limits = [limit_seconds(shape, layers[0], expert_ids, bandwidth, rate) for expert_ids in draws]
        rows.append({"num_tokens": num_tokens, "limit_ms": statistics.median(limits) * 1e3, "ms": row})
        print(op_line(rows[-1]), file=sys.stderr, flush=True)
    return {
        "num_layers_walked": len(layers),
        "num_threads": torch.get_num_threads(),
        "read_bytes_per_s": bandwidth,
        "gemm_flop_per_s": rate,
        "rows": rows,
    }


def walk(calls: Mapping[str, Callable[[Any], Tensor]], layers: list) -> dict[str, Callable[[], Tensor]]:
    """Each call, on its next layer each time; the calls begin at layers as far apart as possible."""

    def step(call: Callable[[Any], Tensor], start: int) -> Callable[[], Tensor]:
        order = cycle(layers[start:] + layers[:start])
        return lambda: call(next(order))

    return {name: step(call, i * len(layers) // len(calls)) for i, (name, call) in enumerate(calls.items())}


def rounds_of(shape: Shape, num_tokens: int) -> int:
    """About two seconds per path, between 7 and 400 rounds."""
    seconds = max(shape.mlp_bytes / 30e9, 6 * shape.hidden_size * shape.intermediate_size * num_tokens / 200e9)
    return max(7, min(400, math.ceil(2 / seconds)))


def check(calls: dict[str, Call], layer: Layer) -> None:
    """Raise ``RuntimeError`` if a path differs from the masked path (without it, from ToMoE's op)."""
    require_agreement({name: call(layer) for name, call in calls.items() if name != "dense"}, 1e-5)


def require_agreement(results: dict[str, Tensor], limit: float) -> None:
    """Raise ``RuntimeError`` if one of ``results`` differs from "masked" (without it, from "shared") by more."""
    expected = results["masked" if "masked" in results else "shared"].float()
    for name, result in results.items():
        error = ((result - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
        if not error < limit:
            raise RuntimeError(f"{name} differs from the masked path by {error:.1e} (relative RMS); nothing was timed")


def op_line(row: dict) -> str:
    """The times of one number of tokens, for the terminal."""
    dense = row["ms"]["dense"]["median"]
    times = {name: value["median"] for name, value in row["ms"].items() if name != "dense"}
    parts = [f"dense {dense:.3f} ms", *(f"{name} {ms:.3f} ({dense / ms:.2f} x)" for name, ms in times.items())]
    return f"{row['num_tokens']:>5} tokens: {', '.join(parts)}; limit {row['limit_ms']:.3f}"
