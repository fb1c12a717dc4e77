"""The MLP op alone on a GPU, in bfloat16: the dense MLP and every path of ToMoE's.

dense           cuBLAS (F.linear) and silu_and_mul as inductor compiles it: what vLLM runs for a dense model
masked          the same with the expert's mask in the activation: the masked layout
shared_gather, shared_dense, shared_grouped    the three paths of the shared layout, whatever thresholds are in force
route           the router alone, which every layout needs beside one of them

One call runs the op on all layers, each with another draw of the tokens' experts, and is replayed as a CUDA graph. The
layers hold many times the L2 of a GPU. Times are per layer.

It was never run on a GPU. Its logic is tested on a CPU, in Triton's interpreter.
"""

import statistics
import sys
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.diagnostics.bench.measure import Call, Clock, CudaClock, interleave, summary
from tomoe_vllm.diagnostics.bench.op import draw_experts, limit_seconds, op_line, require_agreement
from tomoe_vllm.diagnostics.bench.shapes import Shape
from tomoe_vllm.diagnostics.device import CudaDevice
from tomoe_vllm.diagnostics.roofline import Chip
from tomoe_vllm.kernels.expert_activation import expert_activation
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import expert_mlp_cuda
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists
from tomoe_vllm.kernels.ops import ExpertTensors
from tomoe_vllm.kernels.route import route

NUM_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
MAX_GATHER = 8
"""gather reads an expert for each token: for more tokens it is not worth timing."""
WALKED_BYTES = 1 << 30
"""Weights of all layers in use: many times the L2 of a GPU."""
ROUNDS = 50
LIMIT = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}
"""Relative RMS by which paths may differ; see ``kernel_checks.LIMITS``."""

Path = Callable[["GpuLayer", Tensor, Tensor], Tensor]


class GpuLayer:
    """One layer with random weights. All paths: [T, D], experts [T] -> [T, D] in the dtype of the weights."""

    def __init__(self, shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> None:
        device, hidden, neurons = generator.device, shape.hidden_size, shape.intermediate_size

        def random(*size: int) -> Tensor:
            return (torch.randn(*size, generator=generator, device=device) * size[-1] ** -0.5).to(dtype)

        order = torch.rand(shape.num_experts, neurons, generator=generator, device=device).argsort(dim=1)
        self.masks = torch.zeros(shape.num_experts, neurons, device=device, dtype=dtype)
        self.masks.scatter_(1, order[:, : shape.expert_width], 1.0)
        self.neuron_ids, self.widths = neuron_lists(self.masks)
        self.up, self.down = random(2 * neurons, hidden), random(hidden, neurons)
        self.router = torch.randn(shape.num_experts, hidden, generator=generator, device=device)
        lists = self.masks, self.neuron_ids, self.widths
        self.shared = ExpertTensors(self.up, None, self.down.t().contiguous(), *lists, "silu")


def silu_and_mul(projected: Tensor) -> Tensor:
    """The activation of a dense MLP as vLLM writes it for the compiler."""
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate) * up


def masked_silu_and_mul(projected: Tensor, expert_ids: Tensor, masks: Tensor) -> Tensor:
    """The activation of the masked layout."""
    return expert_activation(projected, expert_ids, masks, "silu")


def make_paths(num_tokens: int, is_compiled: bool) -> dict[str, Path]:
    """The paths to time at this number of tokens. ``is_compiled``: activations go through inductor, as in vLLM."""
    dense, masked = silu_and_mul, masked_silu_and_mul
    if is_compiled:
        dense, masked = torch.compile(dense, dynamic=True), torch.compile(masked, dynamic=True)

    def shared(path: str) -> Path:
        return lambda layer, x, ids: expert_mlp_cuda(x, ids, layer.shared, path)

    paths: dict[str, Path] = {
        "dense": lambda layer, x, ids: F.linear(dense(F.linear(x, layer.up)), layer.down),
        "masked": lambda layer, x, ids: F.linear(masked(F.linear(x, layer.up), ids, layer.masks), layer.down),
        "shared_gather": shared("gather"),
        "shared_dense": shared("dense"),
        "shared_grouped": shared("grouped"),
        "route": lambda layer, x, ids: route(x, layer.router),
    }
    if num_tokens > MAX_GATHER:
        del paths["shared_gather"]
    return paths


def walk_layers(path: Path, layers: list[GpuLayer], x: Tensor, draws: list[Tensor]) -> Call:
    """A call that runs ``path`` on every layer, each with the next draw; it returns the last output."""

    def call() -> Tensor:
        for layer, expert_ids in zip(layers, cycle(draws), strict=False):
            output = path(layer, x, expert_ids)
        return output

    return call


def bench_op_gpu(
    shape: Shape,
    clock: Clock | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    is_compiled: bool = True,
    chip: Chip | None = None,
) -> dict:
    """Milliseconds per layer of each path at every number of tokens, measured once all paths gave the same result.

    ``chip``: rates for the limit; by default those measured on the GPU.

    Raises ``RuntimeError`` if the result of a path differs.
    """
    clock = clock or CudaClock()
    generator = torch.Generator(device).manual_seed(0)
    itemsize = dtype.itemsize
    mlp_bytes = shape.mlp_bytes // 4 * itemsize
    layers = [
        GpuLayer(shape, generator, dtype) for _ in range(max(1, min(shape.num_layers, round(WALKED_BYTES / mlp_bytes))))
    ]
    chip = chip or CudaDevice().measured_chip()
    rows = []
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator, device=device).to(dtype)
        draws = draw_experts(shape.num_experts, num_tokens, generator)
        paths = make_paths(num_tokens, is_compiled)
        results = {name: path(layers[0], x, draws[0]) for name, path in paths.items() if name != "route"}
        require_agreement({name: y for name, y in results.items() if name != "dense"}, LIMIT[dtype])
        calls = {name: clock.prepare(walk_layers(path, layers, x, draws)) for name, path in paths.items()}
        samples = interleave(calls, ROUNDS, warm_up=3, clock=clock)
        ms = {name: summary(values, 1e3 / len(layers)) for name, values in samples.items()}
        limits = [limit_seconds(shape, layers[0], ids, chip.bandwidth, chip.flops, itemsize) for ids in draws]
        route_ms = ms.pop("route")
        limit = statistics.median(limits) * 1e3
        rows.append({"num_tokens": num_tokens, "limit_ms": limit, "ms": ms, "route_ms": route_ms})
        print(f"{op_line(rows[-1])}; route {route_ms['median']:.4f}", file=sys.stderr, flush=True)
    return {
        "num_layers_walked": len(layers),
        "read_bytes_per_s": chip.bandwidth,
        "gemm_flop_per_s": chip.flops,
        "rows": rows,
    }
