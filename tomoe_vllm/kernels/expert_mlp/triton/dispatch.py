"""The op on GPUs: which way a step takes through the weights, by its number of tokens.

    up to gather_tokens       gather: each token reads its expert's rows only
    from grouped_tokens on    grouped: tokens sorted by expert
    between                   masked: cuBLAS on all rows, the mask fused into the activation

`tomoe tune` measures both numbers on a GPU (``thresholds.py``). By the cost model they should be about 3 tokens, since
from 4 on the union of the experts is nearly everything, and 640, twice an H100's ridge (docs/performance.md). `tomoe
doctor` must have found the kernels right on this kind of GPU before the layer takes this path (``verdict.py``).
"""

from functools import cache

import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton
from tomoe_vllm.kernels.expert_mlp.triton.gather import expert_mlp_gather
from tomoe_vllm.kernels.expert_mlp.triton.grouped import expert_mlp_grouped
from tomoe_vllm.kernels.expert_mlp.triton.thresholds import load_thresholds
from tomoe_vllm.kernels.ops import LIBRARY, ExpertTensors


def expert_mlp_cuda(
    hidden_states: Tensor, expert_ids: Tensor, weights: ExpertTensors, path: str | None = None
) -> Tensor:
    """See :func:`tomoe_vllm.kernels.expert_mlp.expert_mlp`. ``path``: by default that of the device's thresholds."""
    path = path or load_thresholds().path(hidden_states.shape[0])
    up, up_bias, down, masks, neuron_ids, widths, activation = weights.flat()
    if path == "dense":
        projected = F.linear(hidden_states, up, up_bias)
        return expert_activation_triton(projected, expert_ids, masks, activation) @ down
    run = expert_mlp_gather if path == "gather" else expert_mlp_grouped
    return run(hidden_states, expert_ids, up, up_bias, down, neuron_ids, widths, activation)


@cache
def load() -> None:
    """Make this the version of ``tomoe::expert_mlp`` that runs on CUDA tensors."""
    LIBRARY.impl("expert_mlp", lambda x, ids, *weights: expert_mlp_cuda(x, ids, ExpertTensors(*weights)), "CUDA")
