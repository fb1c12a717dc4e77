"""Widths for methods that do not learn them: the largest within the budget (counted by eq. 8)."""

from tomoe_training.budget import Widths
from tomoe_vllm.hf.tomoe_math import BlockShape

EXPERT_COUNTS = range(8, 33)
"""Numbers of experts an MLP may be split into. The papers use 8 to 16; 32 allows finer steps of the budget."""


class OutOfBudgetError(ValueError):
    """A method cannot fit this budget at any width."""


def mlp_width(shape: BlockShape, active_ratio: float, qk_dims: int, vo_dims: int) -> int:
    """Largest MLP width for which a block with these attention dims is within ``active_ratio``.

    Raises :class:`OutOfBudgetError` if attention alone uses the budget.
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
    """The same widths in every layer: ``attention_ratio`` of the head dims, and the rest of the budget for the MLP.

    The number of Q/K dims is even (RoPE pairs).
    """
    qk_dims = max(2, int(attention_ratio * shape.head_dim) // 2 * 2) if attention_ratio < 1 else shape.head_dim
    vo_dims = max(1, int(attention_ratio * shape.head_dim))
    width = mlp_width(shape, active_ratio, qk_dims, vo_dims)
    return Widths(
        experts=[width] * num_layers, qk_dims=[qk_dims] * num_layers, vo_dims=[vo_dims] * num_layers, shift=0.0
    )


def equal_experts(num_neurons: int, width: int) -> tuple[int, int]:
    """(N experts, n active) of equal disjoint experts with the largest n * F / N that is at most ``width``.

    The smallest N on a tie. Raises :class:`OutOfBudgetError` if there is none.
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
