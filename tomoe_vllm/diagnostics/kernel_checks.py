"""Checks and times every Triton kernel against its plain-torch reference, for ``tomoe doctor``.

On a GPU: at the model's size, the outputs' memory filled with NaN before, captured into a CUDA graph that is
replayed for other experts, and timed from that graph. In the interpreter (no GPU, TRITON_INTERPRET=1 before
this module is imported): the same checks at a tiny size, no graph, no time.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import JITFunction

from tomoe_vllm.diagnostics.roofline import Chip, MLPShape, costs
from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton.gather import expert_mlp_gather, gather_reduce_kernel
from tomoe_vllm.kernels.expert_mlp.triton.grouped import expert_mlp_grouped
from tomoe_vllm.kernels.ops import ExpertTensors

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 1.5e-3}
"""Relative RMS, overall and worst row. Rounding to bf16 between the GEMMs costs 0.4 % overall and 0.7 % in the
worst row; one wrong tile of 16 of 5,504 neurons costs 7 %, a misrouted token over 100 % of its row."""

GPU_TOKENS = {"gather": (1, 2, 3), "masked": (1, 16, 256), "grouped": (16, 128, 512, 2048)}
INTERPRETER_TOKENS = {"gather": (1, 3), "masked": (1, 5), "grouped": (3, 70)}


@dataclass(kw_only=True, slots=True)
class Check:
    """One kernel at one number of tokens. ``error``: why it failed to run at all."""

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
        """Every comparison was made and lies within the limit."""
        return self.error is None and max(self.overall, self.worst_row) <= self.limit

    def describe(self) -> str:
        """The failure in one line."""
        what = self.error or f"relative RMS {self.overall:.1e} overall, {self.worst_row:.1e} worst row"
        return f"{self.path}, {self.num_tokens} tokens, {self.routing}, {self.dtype}: {what} (limit {self.limit:.1e})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Random weights of one layer, with experts of unequal width around ``shape.width``."""

    shape: MLPShape
    activation: str
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    masks: Tensor  # [N, F] uint8
    all_neurons: Tensor  # [N, F] uint8, ones
    neuron_ids: Tensor
    widths: Tensor

    @classmethod
    def random(cls, shape: MLPShape, activation: str, has_bias: bool, dtype: torch.dtype, device: str) -> "Layer":
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        num_up = shape.num_neurons * (shape.num_matrices - 1)
        share = torch.rand((shape.num_experts, shape.num_neurons), generator=generator, device=device)
        masks = share < shape.active_ratio
        masks[:, 0] = True
        widths = masks.sum(dim=1).int()
        # A stable sort puts an expert's neurons first, in their order.
        order = torch.sort((~masks).to(torch.uint8), dim=1, stable=True).indices
        return cls(
            shape=shape,
            activation=activation,
            up_weight=(randn(num_up, shape.hidden_size) / shape.hidden_size**0.5).to(dtype),
            up_bias=randn(num_up).to(dtype) if has_bias else None,
            down_weight=(randn(shape.num_neurons, shape.hidden_size) / shape.width**0.5).to(dtype),
            masks=masks.to(torch.uint8),
            all_neurons=torch.ones_like(masks, dtype=torch.uint8),
            neuron_ids=order[:, : int(widths.max())].int().contiguous(),
            widths=widths,
        )

    def run(self, path: str, hidden_states: Tensor, expert_ids: Tensor) -> Tensor:
        """[T, D] -> [T, D] by ``path``; for ``masked`` with the dense GEMMs around the kernel."""
        if path == "masked":
            projected = F.linear(hidden_states, self.up_weight, self.up_bias)
            return expert_activation_triton(projected, expert_ids, self.masks, self.activation) @ self.down_weight
        kernel = expert_mlp_gather if path == "gather" else expert_mlp_grouped
        weights = (self.up_weight, self.up_bias, self.down_weight)
        return kernel(hidden_states, expert_ids, *weights, self.neuron_ids, self.widths, self.activation)

    def run_dense(self, hidden_states: Tensor, expert_ids: Tensor) -> Tensor:
        """The dense MLP, with the one-kernel activation and no neuron masked."""
        projected = F.linear(hidden_states, self.up_weight, self.up_bias)
        return expert_activation_triton(projected, expert_ids, self.all_neurons, self.activation) @ self.down_weight

    def expected(self, hidden_states: Tensor, expert_ids: Tensor) -> Tensor:
        """The reference in float64 (float32 on a GPU, without TF32)."""
        wide = torch.float32 if hidden_states.is_cuda else torch.float64
        tables = self.masks, self.neuron_ids, self.widths
        weights = ExpertTensors(self.up_weight, self.up_bias, self.down_weight, *tables, self.activation)
        return expert_mlp_reference(hidden_states.to(wide), expert_ids, weights.to(wide))


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
    """torch fills new memory with NaN (integers: the largest), so that what a kernel leaves out is seen."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that cuBLAS may not be deterministic is no concern here
            yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def capture(run: Callable[[], Tensor]) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    """A CUDA graph of ``run`` and the tensor it writes; raises where ``run`` syncs with the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def median_ms(graph: "torch.cuda.CUDAGraph", rounds: int = 30) -> float:
    """Median time of a replay. Weights stay in L2 between replays where they fit: true of small models only."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _compare(check: Check, actual: Tensor, expected: Tensor) -> None:
    overall, worst_row = relative_rms(actual, expected)
    check.overall, check.worst_row = max(overall, check.overall), max(worst_row, check.worst_row)


def run_check(layer: Layer, path: str, num_tokens: int, routing: str, chip: Chip | None) -> Check:
    """Compare one path with the reference; on a GPU (``chip``) also from a CUDA graph, and time it."""
    dtype, device = layer.up_weight.dtype, layer.up_weight.device
    check = Check(
        path=path,
        num_tokens=num_tokens,
        routing=routing,
        dtype=str(dtype).removeprefix("torch."),
        limit=LIMITS[dtype],
    )
    generator = torch.Generator(device).manual_seed(num_tokens)
    size = (num_tokens, layer.shape.hidden_size)
    hidden_states = torch.randn(size, generator=generator, device=device).to(dtype)
    last = layer.shape.num_experts - 1
    expert_ids = torch.randint(last + 1, (num_tokens,), generator=generator, device=device)
    if routing == "one expert":
        expert_ids.fill_(last)
    try:
        with uninitialized_is_nan():
            actual = layer.run(path, hidden_states, expert_ids)
        _compare(check, actual, layer.expected(hidden_states, expert_ids))
        if chip:
            graph, output = capture(lambda: layer.run(path, hidden_states, expert_ids))
            check.ms = median_ms(graph)
            expert_ids.copy_((expert_ids + 1) % (last + 1))
            graph.replay()
            _compare(check, output, layer.expected(hidden_states, expert_ids))
            check.dense_ms = median_ms(capture(lambda: layer.run_dense(hidden_states, expert_ids))[0])
            check.roofline_ms = 1e3 * costs(layer.shape, num_tokens)[path].seconds(chip)
    except Exception as error:  # a kernel that does not compile, launch or capture is a finding, not a crash
        check.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return check


def run_checks(
    shape: MLPShape, activation: str, has_bias: bool, dtypes: list[torch.dtype], device: str, chip: Chip | None
) -> list[Check]:
    """All paths, in each dtype; in the first one also with every token on the last expert."""
    tokens = GPU_TOKENS if chip else INTERPRETER_TOKENS
    checks = []
    for dtype in dtypes:
        layer = Layer.random(shape, activation, has_bias, dtype, device)
        for path, counts in tokens.items():
            checks += [run_check(layer, path, count, "random", chip) for count in counts]
            if dtype is dtypes[0]:
                checks.append(run_check(layer, path, counts[-1], "one expert", chip))
    return checks
