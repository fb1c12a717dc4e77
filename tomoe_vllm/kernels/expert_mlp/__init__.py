"""The MLP of ToMoE on one copy of the weights, as one op: ``tomoe::expert_mlp``.

    out = sum over neurons n that the token's expert keeps of  act(x . gate_n) * (x . up_n) * down_n

Rows are neurons in all matrices (W_down is kept transposed), so an expert is a list of rows, and one copy of the
weights serves all experts. What is read and in which order is decided inside; the op's shapes depend on those of its
inputs alone and it never waits for a device. The CUDA version has three ways, and ``thresholds`` say where it changes;
the C++ version goes by the tokens of each expert.

Versions: plain torch (``reference.py``, the truth, any device and dtype), C++ for float32 on CPUs (``cpu.cpp``,
from the moment ``kernels.native.load()`` succeeds). A CUDA version registers itself the same way, for key "CUDA".
"""

import math

import torch
from torch import Tensor

from tomoe_vllm.kernels.expert_activation import require_activation
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.thresholds import Thresholds

_LIBRARY = torch.library.Library("tomoe", "FRAGMENT")
_LIBRARY.define(
    "expert_mlp(Tensor hidden_states, Tensor expert_ids, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
    "Tensor expert_masks, Tensor neuron_ids, Tensor widths, str activation, int gather_tokens, int grouped_tokens) "
    "-> Tensor"
)


def _reference(
    hidden_states: Tensor,
    expert_ids: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    expert_masks: Tensor,
    neuron_ids: Tensor,
    widths: Tensor,
    activation: str,
    gather_tokens: int,
    grouped_tokens: int,
) -> Tensor:
    down_weight = down_weight.flatten(1)
    return expert_mlp_reference(hidden_states, expert_ids, up_weight, up_bias, down_weight, expert_masks, activation)


_LIBRARY.impl("expert_mlp", _reference, "CompositeExplicitAutograd")


@torch.library.register_fake("tomoe::expert_mlp", lib=_LIBRARY)
def _fake(hidden_states: Tensor, *others: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def path_of(num_tokens: int, thresholds: Thresholds, device_type: str) -> str:
    """How the op takes so many tokens through the weights: "gather", "masked" or "grouped" on a GPU, "rows" (each
    expert's own, the one way there is) elsewhere."""
    if device_type != "cuda":
        return "rows"
    if num_tokens <= thresholds.gather_tokens:
        return "gather"
    return "grouped" if num_tokens >= thresholds.grouped_tokens else "masked"


def require_weights(
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    expert_masks: Tensor,
    neuron_ids: Tensor,
    widths: Tensor,
    activation: str,
) -> None:
    """Raise ``ValueError`` for an activation or shapes that :func:`expert_mlp` cannot take; once, not in each step."""
    require_activation(activation)
    num_neurons, hidden_size = down_weight.shape[0], math.prod(down_weight.shape[1:])
    if up_weight.shape not in ((num_neurons, hidden_size), (2 * num_neurons, hidden_size)):
        raise ValueError(
            f"up_weight is {list(up_weight.shape)}; beside a down_weight of {list(down_weight.shape)} it must be "
            f"{[2 * num_neurons, hidden_size]} (gate and up) or {[num_neurons, hidden_size]} (no gate)"
        )
    if up_bias is not None and up_bias.shape != up_weight.shape[:1]:
        raise ValueError(f"up_bias is {list(up_bias.shape)}; up_weight has {up_weight.shape[0]} rows")
    num_experts = len(widths)
    if expert_masks.shape != (num_experts, num_neurons) or neuron_ids.shape[0] != num_experts:
        raise ValueError(
            f"expert_masks is {list(expert_masks.shape)} and neuron_ids has {neuron_ids.shape[0]} rows; for widths "
            f"of {num_experts} experts and {num_neurons} neurons they must be {[num_experts, num_neurons]} and "
            f"{num_experts}"
        )


def expert_mlp(
    hidden_states: Tensor,
    expert_ids: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    expert_masks: Tensor,
    neuron_ids: Tensor,
    widths: Tensor,
    activation: str,
    thresholds: Thresholds,
) -> Tensor:
    """Each token through its expert's neurons.

    ``hidden_states``: [T, D]; ``expert_ids``: [T] int64; ``up_weight``: [2F, D], the gate's rows first, or [F, D]
    without a gate; ``up_bias``: [2F] or [F], or None; ``down_weight``: [F, D], one row per neuron, or on a CPU
    [F, panels, D / panels] (:func:`~tomoe_vllm.kernels.expert_mlp.rows.empty_panels`); rows may lie apart;
    ``expert_masks``: [N, F] of ones and zeros; ``neuron_ids``, ``widths``: the same as lists
    (:func:`~tomoe_vllm.kernels.expert_mlp.rows.neuron_lists`); floats of one dtype. ``activation``: a Hugging Face
    ``hidden_act``; ``thresholds``: those of the device (``load_thresholds()``, once: it reads a file).
    Returns [T, D], without W_down's bias.

    The weights must have passed :func:`require_weights`. Raises ``ValueError`` for ``hidden_states`` of another width.
    """
    if (width := hidden_states.size(-1)) != up_weight.size(1):
        raise ValueError(f"hidden_states has {width} columns; the weights have {up_weight.size(1)}")
    return torch.ops.tomoe.expert_mlp.default(
        hidden_states,
        expert_ids,
        up_weight,
        up_bias,
        down_weight,
        expert_masks,
        neuron_ids,
        widths,
        activation,
        thresholds.gather_tokens,
        thresholds.grouped_tokens,
    )
