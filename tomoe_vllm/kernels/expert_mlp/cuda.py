"""The op on GPUs: which way a step takes through the weights, by its number of tokens.

    up to GATHER_TOKENS       gather: each token reads its expert's rows only
    from GROUPED_TOKENS on    grouped: tokens sorted by expert
    between                   masked: cuBLAS on all rows, the mask fused into the activation

Both numbers come from the cost model (docs/performance.md), not from a measurement: we have no GPU. ``tomoe doctor``
must have found the kernels right on this kind of GPU before the layer takes this path (``verdict.py``).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton
from tomoe_vllm.kernels.expert_mlp.triton_gather import expert_mlp_gather
from tomoe_vllm.kernels.expert_mlp.triton_grouped import expert_mlp_grouped

GATHER_TOKENS = 3
"""From 4 tokens on the union of their experts is nearly everything: gathering would read more than dense."""
GROUPED_TOKENS = 640
"""Twice an H100's ridge (295 tokens), where halving the FLOPs must pay; an A100's is 153."""

_LIBRARY = torch.library.Library("tomoe", "FRAGMENT")


def expert_mlp_cuda(
    hidden_states: Tensor,
    expert_ids: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    expert_masks: Tensor,
    neuron_ids: Tensor,
    widths: Tensor,
    activation: str,
    group_tokens: int,
    streamed_tokens: int,
) -> Tensor:
    """See :func:`tomoe_vllm.kernels.expert_mlp.expert_mlp`; the two thresholds are the CPU's, without effect here."""
    num_tokens = hidden_states.shape[0]
    lists = (hidden_states, expert_ids, up_weight, up_bias, down_weight, neuron_ids, widths, activation)
    if num_tokens <= GATHER_TOKENS:
        return expert_mlp_gather(*lists)
    if num_tokens >= GROUPED_TOKENS:
        return expert_mlp_grouped(*lists)
    projected = F.linear(hidden_states, up_weight, up_bias)
    return expert_activation_triton(projected, expert_ids, expert_masks, activation) @ down_weight


@cache
def load() -> None:
    """Make this the version of ``tomoe::expert_mlp`` that runs on CUDA tensors."""
    import tomoe_vllm.kernels.expert_mlp  # noqa: F401  (it defines the op)

    _LIBRARY.impl("expert_mlp", expert_mlp_cuda, "CUDA")
