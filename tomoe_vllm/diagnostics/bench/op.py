"""The MLP op alone: ToMoE's against the dense MLP and against vLLM's fused MoE, as vLLM's CPU build runs them.

dense   the layer that vLLM serves a dense model with: oneDNN on packed weights (UnquantizedLinearMethod), silu_and_mul
shared  tomoe::expert_mlp on one copy of the weights
masked  the dense layer with the expert's mask in its activation (the layout for quantized weights and LoRA)
fused   vLLM's CPU fused MoE (isa "vec") over materialised experts: N/2 times the memory

Several layers are walked in turn, as a model walks them: one layer alone would stay in the caches. Each way is at
another layer, since some share their weights and would find them in a cache that the way before filled. The tokens'
experts are drawn anew, too, the same ones for each way. The limit is max(bytes that must be read / bandwidth,
operations / GEMM rate), with the bytes of the union of the experts touched.
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
from tomoe_vllm.kernels.expert_mlp.triton.thresholds import load_thresholds
from tomoe_vllm.kernels.expert_mlp.weight_layout import empty_panels, empty_rows, neuron_lists, neuron_order

NUM_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)
NUM_DRAWS = 32
"""Of the tokens' experts: how many neurons these share, and in how many runs they lie, differs."""
WALKED_BYTES = 400 << 20
"""Dense bytes of the layers walked in turn: many times the caches of a core."""


class Layer:
    """One random layer, its weights held once by each way."""

    def __init__(self, shape: Shape, generator: torch.Generator, ways: tuple[str, ...]) -> None:
        from vllm import _custom_ops as ops

        hidden, neurons, width = shape.hidden_size, shape.intermediate_size, shape.expert_width
        self.up = empty_rows(2 * neurons, hidden).normal_(0, hidden**-0.5, generator=generator)
        self.down = empty_panels(neurons, hidden).normal_(0, neurons**-0.5, generator=generator)
        order = torch.rand(shape.num_experts, neurons, generator=generator).argsort(dim=1)
        masks = torch.zeros(shape.num_experts, neurons).scatter_(1, order[:, :width], 1.0)
        self.masks = masks[:, neuron_order(masks)]  # the layer orders weights too; these are random anyway
        self.neuron_ids, self.widths = neuron_lists(self.masks)
        lists = self.masks, self.neuron_ids, self.widths
        self.weights = ExpertWeights(self.up, None, self.down, *lists, "silu", load_thresholds())
        down = self.down.flatten(1)
        self.packed_up = ops.create_onednn_mm(self.up.contiguous().t(), 32)
        self.packed_down = ops.create_onednn_mm(down, 32)
        if "fused" in ways:
            padding = -width % 32  # the kernel takes whole multiples, and vLLM pads in the same way
            gate, up, down = (
                F.pad(torch.stack([rows[ids] for ids in self.neuron_ids.long()]), (0, 0, 0, padding))
                for rows in (self.up[:neurons], self.up[neurons:], down)
            )
            self.w13 = ops.cpu_prepack_moe_weight(torch.cat([gate, up], dim=1), "vec")
            self.w2 = ops.cpu_prepack_moe_weight(down.mT.contiguous(), "vec")

    def dense(self, x: Tensor, expert_ids: Tensor | None = None) -> Tensor:
        from vllm import _custom_ops as ops

        projected = ops.onednn_mm(self.packed_up, x, None)
        hidden = projected.new_empty(len(x), projected.shape[1] // 2)
        torch.ops._C.silu_and_mul(hidden, projected)
        return ops.onednn_mm(self.packed_down, hidden, None)

    def masked(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        from vllm import _custom_ops as ops

        projected = ops.onednn_mm(self.packed_up, x, None)
        return ops.onednn_mm(self.packed_down, expert_activation(projected, expert_ids, self.masks, "silu"), None)

    def shared(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        return expert_mlp(x, expert_ids, self.weights)

    def fused(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        from vllm import _custom_ops as ops

        output = torch.empty_like(x)
        weights = torch.ones(len(x), 1)
        ops.cpu_fused_moe(output, x, self.w13, self.w2, None, None, weights, expert_ids[:, None].int(), "silu", "vec")
        return output


Call = Callable[[Layer], Tensor]


def draw_experts(num_experts: int, num_tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Random experts of ``num_tokens`` tokens, [T] int64, for the calls of a way in turn."""
    return [torch.randint(num_experts, (num_tokens,), generator=generator) for _ in range(NUM_DRAWS)]


def call_with(way: Callable[[Any, Tensor, Tensor], Tensor], x: Tensor, draws: list[Tensor]) -> Callable[[Any], Tensor]:
    """``way(layer, x, expert_ids)`` with the next draw at each call."""
    drawn = cycle(draws)
    return lambda layer: way(layer, x, next(drawn))


def make_layers(shape: Shape, ways: tuple[str, ...]) -> list[Layer]:
    """As many layers as :data:`WALKED_BYTES` takes, at most those of the model."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    generator = torch.Generator().manual_seed(0)
    count = max(1, min(shape.num_layers, round(WALKED_BYTES / shape.mlp_bytes)))
    return [Layer(shape, generator, ways) for _ in range(count)]


def limit_seconds(shape: Shape, layer: Layer, expert_ids: Tensor, bandwidth: float, rate: float) -> float:
    """What no implementation can undercut on this machine, for these tokens."""
    union = int((layer.masks[expert_ids.unique()].sum(dim=0) > 0).sum())
    num_bytes = 3 * 4 * shape.hidden_size * union
    operations = 2 * 3 * shape.hidden_size * float(layer.widths[expert_ids].sum())
    return max(num_bytes / bandwidth, operations / rate)


def bench_op(shape: Shape, ways: tuple[str, ...] = ("dense", "shared", "masked", "fused")) -> dict:
    """Milliseconds of each way at every number of tokens; checks first that all of them agree.

    Raises ``RuntimeError`` without a C++ compiler, or if a way's result differs.
    """
    if not build.load():
        raise RuntimeError("the CPU kernels could not be compiled, so there is nothing to compare; install g++")
    bandwidth, rate = read_bandwidth(), gemm_rate()
    layers = make_layers(shape, ways)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator)
        draws = draw_experts(shape.num_experts, num_tokens, generator)
        calls: dict[str, Call] = {way: call_with(getattr(Layer, way), x, draws) for way in ways}
        check(calls, layers[0])
        samples = interleave(walk(calls, layers), rounds=rounds_of(shape, num_tokens), warm_up=2)
        row = {name: summary(values, 1e3) for name, values in samples.items()}
        limits = [limit_seconds(shape, layers[0], expert_ids, bandwidth, rate) for expert_ids in draws]
        rows.append({"num_tokens": num_tokens, "limit_ms": statistics.median(limits) * 1e3, "ms": row})
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    return {
        "num_layers_walked": len(layers),
        "num_threads": torch.get_num_threads(),
        "read_bytes_per_s": bandwidth,
        "gemm_flop_per_s": rate,
        "rows": rows,
    }


def walk(calls: Mapping[str, Callable[[Any], Tensor]], layers: list) -> dict[str, Callable[[], Tensor]]:
    """Each call on its next layer each time; they begin as far apart as the layers allow."""

    def step(call: Callable[[Any], Tensor], start: int) -> Callable[[], Tensor]:
        order = cycle(layers[start:] + layers[:start])
        return lambda: call(next(order))

    return {name: step(call, i * len(layers) // len(calls)) for i, (name, call) in enumerate(calls.items())}


def rounds_of(shape: Shape, num_tokens: int) -> int:
    """About two seconds per way, between 7 and 400 rounds."""
    seconds = max(shape.mlp_bytes / 30e9, 6 * shape.hidden_size * shape.intermediate_size * num_tokens / 200e9)
    return max(7, min(400, math.ceil(2 / seconds)))


def check(calls: dict[str, Call], layer: Layer) -> None:
    """Raise ``RuntimeError`` if a way differs from the masked form (without it, from ToMoE's op)."""
    results = {name: call(layer) for name, call in calls.items() if name != "dense"}
    expected = results["masked" if "masked" in results else "shared"]
    for name, result in results.items():
        error = ((result - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
        if not error < 1e-5:
            raise RuntimeError(f"{name} differs from the masked form by {error:.1e} (relative RMS); not timed")


def _line(row: dict) -> str:
    dense = row["ms"]["dense"]["median"]
    parts = [f"{name} {value['median']:.3f} ms ({dense / value['median']:.2f} x)" for name, value in row["ms"].items()]
    return f"{row['num_tokens']:>5} tokens: {', '.join(parts)}; limit {row['limit_ms']:.3f} ms"
