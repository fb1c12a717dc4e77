"""Plain-torch expert MLP on one copy of the weights: what every other path must equal.

Rows are neurons in all three matrices (W_down is kept transposed), so an expert is a list of rows.
"""

import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.kernels.expert_activation.reference import expert_activation_reference


def expert_mlp_reference(
    hidden_states: Tensor,
    expert_ids: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    expert_masks: Tensor,
    activation: str,
) -> Tensor:
    """The masked form (eq. 3, appendix B.3): dense GEMMs, and the routed expert's mask between them.

    ``hidden_states``: [T, D]; ``expert_ids``: [T] int64; ``up_weight``: [2F, D], the gate's rows first, or
    [F, D] without a gate; ``up_bias``: [2F] or [F]; ``down_weight``: [F, D], one row per neuron;
    ``expert_masks``: [N, F] of ones and zeros; all floats of one dtype. Returns [T, D], without W_down's bias.
    """
    projected = F.linear(hidden_states, up_weight, up_bias)
    return expert_activation_reference(projected, expert_ids, expert_masks, activation) @ down_weight
