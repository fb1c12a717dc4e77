"""Compares every Triton kernel with its plain-torch reference and times it, for ``tomoe doctor``.

On a GPU, at the model's size: output memory is filled with NaN first, the kernel is captured into a CUDA graph, the
graph is replayed for other experts and timed. In the interpreter (no GPU; TRITON_INTERPRET=1 before this module is
imported), at a tiny size: the same comparisons, without graph and time.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from tomoe_vllm.diagnostics.roofline import Chip, MLPShape, costs
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import expert_mlp_cuda
from tomoe_vllm.kernels.expert_mlp.triton.gather import gather_reduce_kernel
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists
from tomoe_vllm.kernels.ops import ExpertTensors

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 1.5e-3}
"""Limits of the relative RMS error, overall and of the worst row. Rounding to bf16 between the GEMMs causes 0.4 %
overall and 0.7 % in the worst row; one wrong tile of 16 of 5,504 neurons 7 %, and a misrouted token over 100 % of its
row."""

GPU_TOKENS = {"gather": (1, 2, 3), "dense": (1, 16, 256), "grouped": (16, 128, 512, 2048)}
INTERPRETER_TOKENS = {"gather": (1, 3), "dense": (1, 5), "grouped": (3, 70)}


@dataclass(kw_only=True, slots=True)
class Check:
    """One execution path at one number of tokens. ``error``: why it did not run."""

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

    def describe(self) -> str:
        """The failure in one line."""
        what = self.error or f"relative RMS {self.overall:.1e} overall, {self.worst_row:.1e} worst row"
        return f"{self.path}, {self.num_tokens} tokens, {self.routing}, {self.dtype}: {what} (limit {self.limit:.1e})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Random weights of one layer, with experts of unequal width around ``shape.width``.

    ``dense``: the same weights with all neurons in every expert.
    """

    shape: MLPShape
    weights: ExpertTensors
    dense: ExpertTensors

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
        return cls(shape=shape, weights=weights, dense=replace(weights, masks=torch.ones_like(weights.masks)))

    def expected(self, hidden_states: Tensor, expert_ids: Tensor) -> Tensor:
        """The reference in float64, or in float32 without TF32 on a GPU. Returns [T, D]."""
        wide = torch.float32 if hidden_states.is_cuda else torch.float64
        return expert_mlp_reference(hidden_states.to(wide), expert_ids, self.weights.to(wide))


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


def capture(run: Callable[[], Tensor]) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    """Capture ``run`` into a CUDA graph. Returns the graph and its output. Raises if ``run`` syncs with the host."""
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
    """Median time of a replay. The weights of small models stay in L2 between replays, which makes them look faster."""
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
    """Compare one path with the reference. On a GPU (``chip``) also compare and time it as a CUDA graph."""
    dtype, device = layer.weights.up.dtype, layer.weights.up.device
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
            actual = expert_mlp_cuda(hidden_states, expert_ids, layer.weights, path)
        _compare(check, actual, layer.expected(hidden_states, expert_ids))
        if chip:
            graph, output = capture(lambda: expert_mlp_cuda(hidden_states, expert_ids, layer.weights, path))
            check.ms = median_ms(graph)
            expert_ids.copy_((expert_ids + 1) % (last + 1))
            graph.replay()
            _compare(check, output, layer.expected(hidden_states, expert_ids))
            check.dense_ms = median_ms(
                capture(lambda: expert_mlp_cuda(hidden_states, expert_ids, layer.dense, "dense"))[0]
            )
            check.roofline_ms = 1e3 * costs(layer.shape, num_tokens)[path].seconds(chip)
    except Exception as error:  # a kernel that fails to compile, launch or capture is a failed check
        check.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return check


def run_checks(
    shape: MLPShape, activation: str, has_bias: bool, dtypes: list[torch.dtype], device: str, chip: Chip | None
) -> list[Check]:
    """Check all paths in each dtype; in the first dtype also with all tokens on the last expert."""
    tokens = GPU_TOKENS if chip else INTERPRETER_TOKENS
    checks = []
    for dtype in dtypes:
        layer = Layer.random(shape, activation, has_bias, dtype, device)
        for path, counts in tokens.items():
            checks += [run_check(layer, path, count, "random", chip) for count in counts]
            if dtype is dtypes[0]:
                checks.append(run_check(layer, path, counts[-1], "one expert", chip))
    return checks
