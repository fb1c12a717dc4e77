"""The op on GPUs: which way a step takes through the weights, by its number of tokens.

    up to gather_tokens       gather: each token reads its expert's rows only
    from grouped_tokens on    grouped: tokens sorted by expert
    between                   masked: cuBLAS on all rows, the mask fused into the activation

`tomoe tune` measures both numbers on a GPU (``thresholds.py``). By the cost model they should be about 3 tokens, since
from 4 on the union of the experts is nearly everything, and 640, twice an H100's ridge (docs/performance.md). `tomoe
doctor` must have found the kernels right on this kind of GPU before the layer takes this path (``verdict.py``).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton
from tomoe_vllm.kernels.expert_mlp.triton.gather import expert_mlp_gather
from tomoe_vllm.kernels.expert_mlp.triton.grouped import expert_mlp_grouped

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
    gather_tokens: int,
    grouped_tokens: int,
) -> Tensor:
    """See :func:`tomoe_vllm.kernels.expert_mlp.expert_mlp`."""
    num_tokens = hidden_states.shape[0]
    lists = (hidden_states, expert_ids, up_weight, up_bias, down_weight, neuron_ids, widths, activation)
    if num_tokens <= gather_tokens:
        return expert_mlp_gather(*lists)
    if num_tokens >= grouped_tokens:
        return expert_mlp_grouped(*lists)
    projected = F.linear(hidden_states, up_weight, up_bias)
    return expert_activation_triton(projected, expert_ids, expert_masks, activation) @ down_weight


@cache
def load() -> None:
    """Make this the version of ``tomoe::expert_mlp`` that runs on CUDA tensors."""
    import tomoe_vllm.kernels.expert_mlp  # noqa: F401  (it defines the op)

    _LIBRARY.impl("expert_mlp", expert_mlp_cuda, "CUDA")
