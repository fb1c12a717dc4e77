"""The expert MLP in plain torch, for any device and dtype. Every kernel is compared with it."""

import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.kernels.expert_activation.reference import expert_activation_reference
from tomoe_vllm.kernels.ops import ExpertTensors


def expert_mlp_reference(hidden_states: Tensor, expert_ids: Tensor, weights: ExpertTensors) -> Tensor:
    """Dense GEMMs with the routed expert's mask between them (eq. 3, appendix B.3). No FLOP is saved.

    ``hidden_states``: [T, D]; ``expert_ids``: [T] int64. ``weights.neuron_ids`` and ``weights.widths`` are not read.
    Returns [T, D], without W_down's bias.
    """
    projected = F.linear(hidden_states, weights.up, weights.up_bias)
    hidden = expert_activation_reference(projected, expert_ids, weights.masks, weights.activation)
    return hidden @ weights.down.flatten(1)
