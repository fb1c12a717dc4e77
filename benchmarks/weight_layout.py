"""What each part of the weights' layout is worth. Run: python benchmarks/weight_layout.py --shape 1b

The same op on weights in different layouts (``kernels/expert_mlp/weight_layout.py``), calls interleaved in one process:

served       the layout of the layer
unordered    neurons in the order of the checkpoint
rows         W_down as one row per neuron instead of panels
small pages  in memory without advice to use huge pages (matters where Linux gives them on request only)

Experts are random, or with ``--checkpoint DIR`` those of that checkpoint's layers, whose size replaces ``--shape``.
Prints medians in milliseconds a layer and the contiguous runs of rows per expert; the last line is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tomoe_vllm.diagnostics.bench.measure import interleave, summary
from tomoe_vllm.diagnostics.bench.op import WALKED_BYTES, call_with, draw_experts, rounds_of, walk
from tomoe_vllm.diagnostics.bench.shapes import SHAPES, Shape
from tomoe_vllm.hf.tomoe_math import unpack_signature
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_mlp import ExpertWeights, expert_mlp
from tomoe_vllm.kernels.expert_mlp.weight_layout import empty_panels, empty_rows, neuron_lists, neuron_order

CHANGES = {"served": "", "unordered": "order", "rows": "panels", "small pages": "huge pages"}
"""Layouts and the part that each of them lacks."""


def lay_out(masks: Tensor, hidden_size: int, without: str) -> ExpertWeights:
    if without != "order":
        masks = masks[:, neuron_order(masks)]
    neurons = masks.shape[1]
    up = empty_rows(2 * neurons, hidden_size)
    down = (empty_rows if without == "panels" else empty_panels)(neurons, hidden_size)
    if without == "huge pages":
        up, down = (like(weights) for weights in (up, down))
    up.normal_(0, hidden_size**-0.5)
    down.normal_(0, neurons**-0.5)
    return ExpertWeights(up, None, down, masks, *neuron_lists(masks), "silu")


def like(weights: Tensor) -> Tensor:
    """Uninitialized, with the shape and strides of ``weights``, allocated by malloc."""
    return torch.empty(weights.untyped_storage().nbytes() // 4).as_strided(weights.shape, weights.stride())


def runs_of(weights: ExpertWeights) -> float:
    """Contiguous runs of rows per expert, on average."""
    before = torch.zeros(len(weights.masks), 1)
    return (weights.masks.diff(dim=1, prepend=before) == 1).sum(dim=1).float().mean().item()


def random_experts(shape: Shape, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    orders = [torch.rand(shape.num_experts, shape.intermediate_size, generator=generator) for _ in range(count)]
    return [(order.argsort(dim=1).argsort(dim=1) < shape.expert_width).float() for order in orders]


def experts_of(checkpoint: Path) -> tuple[int, list[Tensor]]:
    """hidden_size of a ToMoE checkpoint, and the expert masks [N, F] of its layers."""
    config = json.loads((checkpoint / "config.json").read_text())
    masks = []
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith("expert_gate.signature")]  # noqa: SIM118
            masks += [unpack_signature(tensors.get_tensor(name), config["num_experts"]).float() for name in names]
    return config["hidden_size"], masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--checkpoint", type=Path, help="a ToMoE checkpoint whose experts to use")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256])
    arguments = parser.parse_args()
    if not build.load():
        sys.exit("the CPU kernels could not be compiled")
    shape = SHAPES[arguments.shape]
    # At least as many layers as layouts: two at the same layer would find its rows in the cache.
    count = max(len(CHANGES), min(shape.num_layers, WALKED_BYTES // shape.mlp_bytes))
    hidden_size, experts = shape.hidden_size, random_experts(shape, count)
    if arguments.checkpoint:
        hidden_size, experts = experts_of(arguments.checkpoint)
    layers = [{name: lay_out(masks, hidden_size, without) for name, without in CHANGES.items()} for masks in experts]
    runs = {name: sum(runs_of(layer[name]) for layer in layers) / len(layers) for name in CHANGES}
    print(", ".join(f"{name} {value:.0f}" for name, value in runs.items()), "runs per expert", file=sys.stderr)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for num_tokens in arguments.tokens:
        x = torch.randn(num_tokens, hidden_size, generator=generator)
        draws = draw_experts(len(experts[0]), num_tokens, generator)
        calls = {
            name: call_with(lambda layer, *step, n=name: expert_mlp(*step, layer[n]), x, draws) for name in CHANGES
        }
        samples = interleave(walk(calls, layers), rounds=2 * rounds_of(shape, num_tokens), warm_up=2)
        row = {name: summary(values, 1e3) for name, values in samples.items()}
        rows.append({"num_tokens": num_tokens, "ms": row})
        served = row["served"]["median"]
        parts = [f"{name} {value['median']:.3f} ({value['median'] / served:.2f} x)" for name, value in row.items()]
        print(f"{num_tokens:>5} tokens: {', '.join(parts)} ms", file=sys.stderr, flush=True)
    print(json.dumps({"num_layers": len(layers), "num_threads": torch.get_num_threads(), "runs": runs, "rows": rows}))


if __name__ == "__main__":
    main()
