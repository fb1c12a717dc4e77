"""Compares the kernels beside the expert MLP with plain torch: routing, value masks and the expert activation.

As in ``kernel_checks.py``: into memory filled with NaN, then in a CUDA graph with other tokens. Times are those of one
call in a chain of calls, which is what these small kernels cost in a layer.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tomoe_vllm.diagnostics.device import Device
from tomoe_vllm.diagnostics.kernel_checks import (
    LIMITS,
    WRONG,
    Check,
    Layer,
    name_of,
    one_line,
    relative_rms,
    uninitialized_is_nan,
)
from tomoe_vllm.diagnostics.layers import GateShape
from tomoe_vllm.hf.tomoe_math import top_mask, value_logits
from tomoe_vllm.kernels.expert_activation.reference import expert_activation_reference
from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton
from tomoe_vllm.kernels.ops import ValueRouter

CHOICE_LIMIT = 1e-3
"""Limit of a wrong choice: by how much the chosen logit is below the best one, over the RMS of the logits. The kernels
sum in another order than the reference, which moves a logit by 1e-6 to 1e-5; a missing slice of D moves it by 0.1."""


def choice_error(logits: Tensor, chosen: Tensor) -> float:
    """How far the chosen experts [T] are from the largest logits [T, N], over the RMS of the logits."""
    if not bool(((chosen >= 0) & (chosen < logits.shape[1])).all()):
        return WRONG
    missed = logits.max(dim=1).values - logits.gather(1, chosen[:, None])[:, 0]
    return float(missed.max() / logits.square().mean().sqrt())


def mask_error(logits: Tensor, attention: Tensor, masked: Tensor, width: int) -> float:
    """How far the dims kept in ``masked`` [T, H * A] are from the ``width`` largest logits [T, A], over their RMS.

    :data:`WRONG` if heads differ, if a token keeps more or fewer dims, or if a kept value is not that of ``attention``
    (which has no zeros).
    """
    heads = masked.unflatten(1, (-1, logits.shape[1]))
    kept = heads[:, 0] != 0
    expected = torch.where(kept[:, None], attention.view_as(heads), 0)
    if not torch.equal(heads, expected) or not bool((kept.sum(dim=1) == width).all()):
        return WRONG
    differs = kept != top_mask(logits, width)
    smallest = logits.topk(width, dim=1).values[:, -1:]
    return float(torch.where(differs, (logits - smallest).abs(), 0).max() / logits.square().mean().sqrt())


def _run(check: Check, device: Device, run: Callable[[], Tensor], change: Callable[[], object], compare) -> Check:
    """Fill in ``check``: ``run`` once and in a graph after ``change``, each time with the error of ``compare``."""
    try:
        with uninitialized_is_nan():
            check.add_errors(*compare(run()))
        graph = device.capture(run)
        change()
        graph.replay()
        check.add_errors(*compare(graph.output))
        check.ms = device.milliseconds_per_call(run)
    except Exception as error:  # a kernel that fails to compile, launch or capture is a failed check
        check.error = one_line(error)
    return check


def check_route(shape: GateShape, num_tokens: int, dtype: torch.dtype, device: Device) -> Check:
    """Routing with the record of it, and without: two binaries of one kernel."""
    from tomoe_vllm.kernels.route.triton import route_triton

    check = Check(path="route", num_tokens=num_tokens, routing="random", dtype=name_of(dtype), limit=CHOICE_LIMIT)
    generator = torch.Generator(device.type).manual_seed(num_tokens)
    hidden_states = torch.randn((num_tokens, shape.hidden_size), generator=generator, device=device.type).to(dtype)
    router = torch.randn((shape.num_experts, shape.hidden_size), generator=generator, device=device.type)
    record = torch.zeros(num_tokens, dtype=torch.uint8, device=device.type)

    def run() -> Tensor:
        return route_triton(hidden_states, router, record)

    def compare(expert_ids: Tensor) -> tuple[float, float]:
        error = choice_error(hidden_states.double() @ router.double().T, expert_ids)
        if not (
            torch.equal(record.long(), expert_ids) and torch.equal(route_triton(hidden_states, router), expert_ids)
        ):
            error = WRONG
        return error, error

    return _run(check, device, run, hidden_states.neg_, compare)


def check_value_mask(shape: GateShape, num_tokens: int, dtype: torch.dtype, device: Device) -> Check:
    """The mask of each token's values."""
    check = Check(path="mask_values", num_tokens=num_tokens, routing="random", dtype=name_of(dtype), limit=CHOICE_LIMIT)
    generator = torch.Generator(device.type).manual_seed(num_tokens)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device.type)

    hidden_states = randn(num_tokens, shape.hidden_size).to(dtype)
    attention = randn(num_tokens, shape.num_heads * shape.head_dim).to(dtype)
    attention.masked_fill_(attention == 0, 1)
    down, up = randn(shape.rank, shape.hidden_size), randn(shape.head_dim, shape.rank)
    norm_weight = 1 + 0.1 * randn(shape.rank)
    router = ValueRouter(down / shape.hidden_size**0.5, randn(shape.rank), norm_weight, 0.1 * randn(shape.rank), up)

    def run() -> Tensor:
        from tomoe_vllm.kernels.value_mask.triton import mask_values_triton

        return mask_values_triton(attention, hidden_states, router, shape.width)

    def compare(masked: Tensor) -> tuple[float, float]:
        error = mask_error(value_logits(hidden_states, *router), attention, masked, shape.width)
        return error, error

    return _run(check, device, run, hidden_states.neg_, compare)


def check_activation(layer: Layer, num_tokens: int, device: Device) -> Check:
    """The activation with the mask of each token's expert, of the dense path and of the masked layout without compile.

    Uses the weights of ``layer`` for its masks only.
    """
    dtype, weights = layer.dtype, layer.weights
    check = Check(path="activation", num_tokens=num_tokens, routing="random", dtype=name_of(dtype), limit=LIMITS[dtype])
    hidden_states, generator = layer.inputs(num_tokens)
    projected = torch.randn((num_tokens, weights.up.shape[0]), generator=generator, device=hidden_states.device).to(
        dtype
    )
    num_experts = layer.shape.num_experts
    expert_ids = torch.randint(num_experts, (num_tokens,), generator=generator, device=hidden_states.device)

    def compare(actual: Tensor) -> tuple[float, float]:
        masks = weights.masks.double()
        expected = expert_activation_reference(projected.double(), expert_ids, masks, weights.activation)
        is_masked = weights.masks[expert_ids] == 0
        return relative_rms(actual, expected) if not bool(actual[is_masked].any()) else (WRONG, WRONG)

    def run() -> Tensor:
        return expert_activation_triton(projected, expert_ids, weights.masks, weights.activation)

    return _run(check, device, run, lambda: expert_ids.copy_((expert_ids + 1) % num_experts), compare)


def run_gate_checks(
    gates: GateShape, layers: Sequence[Layer], num_tokens: Mapping[torch.dtype, Sequence[int]], device: Device
) -> list[Check]:
    """Check every op of this module at each number of tokens, for the dtypes of ``layers``."""
    checks = []
    for layer in layers:
        for count in num_tokens[layer.dtype]:
            checks += [
                check_route(gates, count, layer.dtype, device),
                check_value_mask(gates, count, layer.dtype, device),
            ]
            checks.append(check_activation(layer, count, device))
    return checks
