"""Has the routers' GPU kernels checked at the sizes of a loaded model; nothing to do on a CPU."""

import logging

from torch import nn

from tomoe_vllm.kernels.device_check import check_on_device
from tomoe_vllm.kernels.ops import rejected_kernels
from tomoe_vllm.layers.attention.attention import ToMoEAttention
from tomoe_vllm.layers.mlp.layout import gather_from_ranks
from tomoe_vllm.layers.mlp.router import ToMoERouter

logger = logging.getLogger(__name__)


def check_routers(model: nn.Module) -> None:
    """Compare the kernels of ``route`` and ``mask_values`` with plain torch if ``model`` is on a GPU.

    Where they disagree the op runs in plain torch, with one warning (:mod:`tomoe_vllm.kernels.device_check`).
    All tensor-parallel ranks then use plain torch: two implementations may choose differently between nearly equal
    logits, and ranks must add parts of the same expert.
    """
    routers = [module for module in model.modules() if isinstance(module, ToMoERouter)]
    if not routers or routers[0].router.weight.device.type != "cuda":
        return
    value_sizes = []
    for attention in model.modules():
        if isinstance(attention, ToMoEAttention) and attention.head_gate.vo_mode == "dynamic":
            head_mask = attention.head_gate
            rank, hidden_size = head_mask.value_down.weight.shape
            value_sizes.append((hidden_size, rank, attention.num_heads, head_mask.head_dim, head_mask.top_k))
    sizes = [(module.router.weight.shape[1], module.num_experts) for module in routers]
    check_on_device(sizes, value_sizes, routers[0].expert_masks.dtype, routers[0].router.weight.device)
    by_rank = gather_from_ranks(" ".join(sorted(rejected_kernels)))
    for name in sorted({name for names in by_rank for name in names.split()} - rejected_kernels):
        rejected_kernels.add(name)
        logger.warning(
            "tomoe::%s runs in plain torch on this GPU, because it does on another tensor-parallel rank", name
        )
