"""Compares the kernels of the expert MLP with their plain-torch reference and times them, for ``tomoe doctor``.

On a GPU, at the model's size: output memory is filled with NaN first, the kernel is captured into a CUDA graph, the
graph is replayed for other experts and timed. In the interpreter (no GPU; TRITON_INTERPRET=1 before this module is
imported), at a tiny size: the same comparisons, without times. ``gate_checks.py`` does the same for the other kernels.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import JITFunction

from tomoe_vllm.diagnostics.device import Device
from tomoe_vllm.diagnostics.layers import MAX_GATHER_TOKENS, PATHS
from tomoe_vllm.diagnostics.roofline import Chip, MLPShape, costs
from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import expert_mlp_cuda
from tomoe_vllm.kernels.expert_mlp.triton.gather import gather_reduce_kernel
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists
from tomoe_vllm.kernels.ops import ExpertTensors

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 1.5e-3}
"""Limits of the relative RMS error, overall and of the worst row. Rounding to bf16 between the GEMMs causes 0.4 %
overall and 0.7 % in the worst row; one wrong tile of 16 of 5,504 neurons 7 %, and a misrouted token over 100 % of its
row."""

WRONG = 1e9
"""Error of an output that no rounding explains."""


@dataclass(kw_only=True, slots=True)
class Check:
    """One kernel at one number of tokens. ``error``: why it did not run.

    ``path``: an execution path of the expert MLP, or another op. ``ms``: of the kernel; ``dense_ms``: of the dense MLP
    as vLLM runs it; ``roofline_ms``: the lower bound by the device's rates.
    """

    path: str
    num_tokens: int
    routing: str
    dtype: str
    limit: float
    overall: float = 0.0
    worst_row: float = 0.0
    error: str | None = None
    ms: float | None = None
    dense_ms: float | None = None
    roofline_ms: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether every comparison was made and is within the limit."""
        return self.error is None and max(self.overall, self.worst_row) <= self.limit

    def add_errors(self, overall: float, worst_row: float) -> None:
        """Keep the largest error of several comparisons; NaN is larger than all."""
        overall, worst_row = (WRONG if math.isnan(error) else error for error in (overall, worst_row))
        self.overall, self.worst_row = max(overall, self.overall), max(worst_row, self.worst_row)

    def reason(self) -> str:
        """Why the check failed."""
        errors = f"relative error {self.overall:.1e} overall, {self.worst_row:.1e} worst row"
        return self.error or f"{errors} (limit {self.limit:.1e})"

    def describe(self) -> str:
        """The failure in one line."""
        return f"{self.path}, {self.num_tokens} tokens, {self.routing}, {self.dtype}: {self.reason()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Random weights of one layer, with experts of unequal width around ``shape.width``.

    ``dense_down``: W_down as a dense model has it, [D, F]. ``all_neurons``: one mask of ones, [1, F].
    """

    shape: MLPShape
    weights: ExpertTensors
    dense_down: Tensor
    all_neurons: Tensor
    _dense_ms: dict[int, float | None] = field(default_factory=dict)

    @classmethod
    def random(cls, shape: MLPShape, activation: str, has_bias: bool, dtype: torch.dtype, device: str) -> "Layer":
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        num_up = shape.num_neurons * (shape.num_matrices - 1)
        share = torch.rand((shape.num_experts, shape.num_neurons), generator=generator, device=device)
        masks = share < shape.active_ratio
        masks[:, 0] = True
        weights = ExpertTensors(
            up=(randn(num_up, shape.hidden_size) / shape.hidden_size**0.5).to(dtype),
            up_bias=randn(num_up).to(dtype) if has_bias else None,
            down=(randn(shape.num_neurons, shape.hidden_size) / shape.width**0.5).to(dtype),
            masks=masks.to(torch.uint8),
            neuron_ids=neuron_lists(masks)[0],
            widths=neuron_lists(masks)[1],
            activation=activation,
        )
        down, ones = weights.down.T.contiguous(), torch.ones_like(weights.masks[:1])
        return cls(shape=shape, weights=weights, dense_down=down, all_neurons=ones)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.weights.up.dtype

    def inputs(self, num_tokens: int) -> tuple[Tensor, torch.Generator]:
        """Random hidden states [T, D], and the generator for what else a check draws."""
        generator = torch.Generator(self.weights.up.device).manual_seed(num_tokens)
        size = (num_tokens, self.shape.hidden_size)
        return torch.randn(size, generator=generator, device=self.weights.up.device).to(self.dtype), generator

    def expected(self, hidden_states: Tensor, expert_ids: Tensor) -> Tensor:
        """The reference in float64, or in float32 without TF32 on a GPU. Returns [T, D]."""
        wide = torch.float32 if hidden_states.is_cuda else torch.float64
        return expert_mlp_reference(hidden_states.to(wide), expert_ids, self.weights.to(wide))

    def dense_mlp(self, hidden_states: Tensor, no_experts: Tensor) -> Tensor:
        """The MLP of the dense model as vLLM runs it on a GPU: cuBLAS, one kernel for the activation, cuBLAS.

        ``no_experts``: [T] int64 zeros. The activation is ToMoE's with a mask of ones, [1, F] for all tokens.
        """
        weights = self.weights
        projected = F.linear(hidden_states, weights.up, weights.up_bias)
        hidden = expert_activation_triton(projected, no_experts, self.all_neurons, weights.activation)
        return F.linear(hidden, self.dense_down)

    def dense_milliseconds(self, num_tokens: int, device: Device) -> float | None:
        """Time of :meth:`dense_mlp`, measured once for each number of tokens."""
        if num_tokens not in self._dense_ms:
            hidden_states, _ = self.inputs(num_tokens)
            ids = torch.zeros(num_tokens, dtype=torch.int64, device=hidden_states.device)
            graph = device.capture(lambda: self.dense_mlp(hidden_states, ids))
            self._dense_ms[num_tokens] = device.milliseconds(graph)
        return self._dense_ms[num_tokens]


def is_interpreted() -> bool:
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    return not isinstance(gather_reduce_kernel, JITFunction)


def relative_rms(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """RMS of the error over the RMS of the expected values: overall, and of the worst row. A NaN counts as 1e9."""
    error = (actual.double() - expected.double()).square().mean(dim=-1)
    size = expected.double().square().mean(dim=-1).clamp(min=1e-30)
    both = torch.stack([error.mean() / size.mean(), (error / size).max()]).sqrt()
    overall, worst_row = both.nan_to_num(nan=1e9, posinf=1e9).tolist()
    return overall, worst_row


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Make torch fill new memory with NaN (integers with their maximum), so that unwritten outputs are detected."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only about cuBLAS, whose determinism does not matter here
            yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def one_line(error: BaseException) -> str:
    """Type and message of an error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def run_check(
    layer: Layer, path: str, num_tokens: int, routing: str, device: Device, chip: Chip | None = None
) -> Check:
    """Compare one path with the reference, then in a graph with other experts, and time it.

    ``routing``: "random", "evenly" (token t to expert t mod N) or "one expert". ``chip``: the rates of the roofline
    time, which float32 has not.
    """
    check = Check(
        path=path, num_tokens=num_tokens, routing=routing, dtype=name_of(layer.dtype), limit=LIMITS[layer.dtype]
    )
    hidden_states, generator = layer.inputs(num_tokens)
    last = layer.shape.num_experts - 1
    expert_ids = torch.randint(last + 1, (num_tokens,), generator=generator, device=hidden_states.device)
    if routing == "one expert":
        expert_ids.fill_(last)
    elif routing == "evenly":
        expert_ids.copy_(torch.arange(num_tokens) % (last + 1))
    try:
        with uninitialized_is_nan():
            actual = expert_mlp_cuda(hidden_states, expert_ids, layer.weights, path)
        check.add_errors(*relative_rms(actual, layer.expected(hidden_states, expert_ids)))
        graph = device.capture(lambda: expert_mlp_cuda(hidden_states, expert_ids, layer.weights, path))
        check.ms = device.milliseconds(graph)
        expert_ids.copy_((expert_ids + 1) % (last + 1))
        graph.replay()
        check.add_errors(*relative_rms(graph.output, layer.expected(hidden_states, expert_ids)))
        check.dense_ms = layer.dense_milliseconds(num_tokens, device)
        if chip and layer.dtype != torch.float32:  # the chip has the FLOP rate of bfloat16 and float16
            check.roofline_ms = 1e3 * costs(layer.shape, num_tokens)[path].seconds(chip)
    except Exception as error:  # a kernel that fails to compile, launch or capture is a failed check
        check.error = one_line(error)
    return check


def run_checks(
    layers: Sequence[Layer],
    num_tokens: Mapping[torch.dtype, Sequence[int]],
    device: Device,
    chip: Chip | None = None,
) -> list[Check]:
    """Check all paths of each layer; those of the first layer also with all tokens on the last expert."""
    checks = []
    for layer in layers:
        for path in PATHS:
            # gather reads the rows of each token: of thousands it would take seconds, and tune never chooses it there
            counts = [count for count in num_tokens[layer.dtype] if path != "gather" or count <= MAX_GATHER_TOKENS]
            checks += [run_check(layer, path, count, "random", device, chip) for count in counts]
            if layer is layers[0]:
                checks.append(run_check(layer, path, max(counts), "one expert", device, chip))
    return checks
