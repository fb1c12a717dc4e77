"""Widths that spend a budget without exceeding it, for methods that do not learn them (eq. 8 counting)."""

from tomoe_training.budget import Widths
from tomoe_vllm.hf.tomoe_math import BlockShape

EXPERT_COUNTS = range(8, 33)
"""Experts an MLP may be split into: the rivals' papers use 8 to 16; 32 makes the budget's steps finer."""


class OutOfBudgetError(ValueError):
    """A method cannot work within this budget, whatever it keeps."""


def mlp_width(shape: BlockShape, active_ratio: float, qk_dims: int, vo_dims: int) -> int:
    """Widest MLP beside attention of these dims whose block is within ``active_ratio``: never over.

    Raises :class:`OutOfBudgetError` where attention alone leaves nothing.
    """
    total = shape.total_parameters
    per_neuron = shape.active_parameters(0, 0, 1)
    attention = shape.active_parameters(qk_dims, vo_dims, 0)
    width = min(int((active_ratio * total - attention) / per_neuron) + 1, shape.intermediate_size)
    while width > 0 and (attention + width * per_neuron) / total > active_ratio:
        width -= 1
    if width <= 0:
        raise OutOfBudgetError(
            f"attention alone uses {attention / total:.3f} of the block parameters: nothing is left for the MLP"
        )
    return width


def uniform_widths(shape: BlockShape, num_layers: int, active_ratio: float, attention_ratio: float) -> Widths:
    """Every layer alike: ``attention_ratio`` of the head dims, and the MLP takes what the budget leaves.

    Kept Q/K dims are even (RoPE pairs).
    """
    qk_dims = max(2, int(attention_ratio * shape.head_dim) // 2 * 2) if attention_ratio < 1 else shape.head_dim
    vo_dims = max(1, int(attention_ratio * shape.head_dim))
    width = mlp_width(shape, active_ratio, qk_dims, vo_dims)
    return Widths(
        experts=[width] * num_layers, qk_dims=[qk_dims] * num_layers, vo_dims=[vo_dims] * num_layers, shift=0.0
    )


def equal_experts(num_neurons: int, width: int) -> tuple[int, int]:
    """(experts N, active n) of equal disjoint experts with n * F / N as near to ``width`` as can be, never over.

    The fewest experts where several are as near. Raises :class:`OutOfBudgetError` where none fits.
    """
    counts = [n for n in EXPERT_COUNTS if num_neurons % n == 0]
    splits = [(n, width * n // num_neurons) for n in counts]
    splits = [(n, num_active) for n, num_active in splits if num_active > 0]
    if not splits:
        raise OutOfBudgetError(
            f"{num_neurons} neurons have no {EXPERT_COUNTS.start} to {EXPERT_COUNTS.stop - 1} equal experts "
            f"of which one is within {width} neurons"
        )
    return max(splits, key=lambda split: (split[1] * num_neurons // split[0], -split[0]))
