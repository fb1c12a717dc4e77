"""``tomoe tune``: measures the dispatch thresholds of the expert MLP on this GPU and writes them to a file."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from tomoe_vllm.diagnostics.bench.shapes import Shape
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import Thresholds, device_name, expert_mlp_cuda
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists
from tomoe_vllm.kernels.ops import ExpertTensors

NUM_TOKENS = (1, 2, 3, 4, 6, 8, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048, 4096)
"""Sizes around the two thresholds that the roofline model predicts (docs/performance.md)."""
NEVER = 1_000_000_000


def best(times: dict[str, dict[int, float]]) -> Thresholds:
    """Thresholds from measured times. ``times``: seconds by path and number of tokens.

    A path is used only where it was faster than the dense path, at that size and at all measured sizes on its side:
    gather at all smaller ones, grouped at all larger ones.
    """
    sizes = sorted(times["dense"])
    gather, grouped = 0, NEVER
    for size in sizes:
        if times["gather"][size] >= times["dense"][size]:
            break
        gather = size
    for size in reversed(sizes):
        if times["grouped"][size] >= times["dense"][size] or size <= gather:
            break
        grouped = size
    return Thresholds(gather_tokens=gather, grouped_tokens=grouped)


def tune(shape: Shape, folder: Path) -> dict:
    """Measure on a random layer of ``shape``, bfloat16, and write ``folder/<device>.json``.

    Raises ``ValueError`` without a GPU: CPUs have one path for every number of tokens.
    """
    if not torch.cuda.is_available():
        raise ValueError("tomoe tune needs a GPU; CPUs have one execution path for every number of tokens")
    from triton.testing import do_bench

    times: dict[str, dict[int, float]] = {}
    for size in NUM_TOKENS:
        for path, run in _paths(shape, size).items():
            times.setdefault(path, {})[size] = 1e-3 * do_bench(run, return_mode="median")
        print(f"{size} tokens measured", file=sys.stderr)
    thresholds = best(times)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{device_name()}.json"
    file.write_text(json.dumps(asdict(thresholds)) + "\n")
    return {"file": str(file), "seconds": times} | asdict(thresholds)


def _paths(shape: Shape, num_tokens: int) -> dict[str, Callable[[], object]]:
    """Functions that run each execution path on one random layer."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden, neurons = shape.hidden_size, shape.intermediate_size

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16) * hidden**-0.5

    order = torch.rand(shape.num_experts, neurons, generator=generator, device="cuda").argsort(dim=1)
    masks = torch.zeros(shape.num_experts, neurons, device="cuda", dtype=torch.bfloat16)
    masks.scatter_(1, order[:, : shape.expert_width], 1.0)
    ids = torch.randint(shape.num_experts, (num_tokens,), generator=generator, device="cuda")
    x, up, down = random(num_tokens, hidden), random(2 * neurons, hidden), random(neurons, hidden)
    weights = ExpertTensors(up, None, down, masks, *neuron_lists(masks), "silu")
    return {path: partial(expert_mlp_cuda, x, ids, weights, path) for path in ("gather", "dense", "grouped")}
