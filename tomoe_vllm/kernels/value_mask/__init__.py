"""``tomoe::mask_values``: applies each token's value mask (eq. 5) to its attention output.

One C++ call on CPUs, where the separate torch ops take about 90 us per layer for one token, most of it the overhead of
ten calls. Two Triton launches on CUDA (``triton.py``), where they are 14.
"""

import torch
from torch import Tensor

from tomoe_vllm.hf.tomoe_math import mask_heads, top_mask, value_logits
from tomoe_vllm.kernels.ops import LIBRARY, ValueRouter, rejected_kernels


def mask_values_reference(attention: Tensor, hidden_states: Tensor, router: ValueRouter, width: int) -> Tensor:
    """Plain torch, any device and dtype; see :func:`mask_values`."""
    return mask_heads(attention, top_mask(value_logits(hidden_states, *router), width).to(attention.dtype))


def _reference(attention: Tensor, hidden_states: Tensor, *router_and_width) -> Tensor:
    *router, width = router_and_width
    return mask_values_reference(attention, hidden_states, ValueRouter(*router), width)


def _cuda(attention: Tensor, hidden_states: Tensor, *router_and_width) -> Tensor:
    if "mask_values" in rejected_kernels:
        return _reference(attention, hidden_states, *router_and_width)
    from tomoe_vllm.kernels.value_mask.triton import mask_values_triton  # needs Triton, which a CPU may lack

    *router, width = router_and_width
    return mask_values_triton(attention, hidden_states, ValueRouter(*router), width)


LIBRARY.impl("mask_values", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("mask_values", _cuda, "CUDA")


def mask_values(attention: Tensor, hidden_states: Tensor, router: ValueRouter, width: int) -> Tensor:
    """Multiply each head of ``attention`` by its token's mask of the ``width`` largest value logits.

    ``attention``: [T, H * A]; ``hidden_states``: [T, D], what q, k and v were projected from, same dtype. Returns
    [T, H * A]. Ties are resolved as ``tomoe_math.top_mask`` does on that device.
    """
    if attention.device.type == "cpu" and attention.dtype != torch.float32:  # the C++ takes float32 only
        return mask_values_reference(attention, hidden_states, router, width)
    return torch.ops.tomoe.mask_values.default(attention, hidden_states, *router, width)
