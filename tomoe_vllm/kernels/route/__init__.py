"""``tomoe::route``: the expert of each token. Triton on CUDA; C++ on CPUs after ``build.load()``; else plain torch.

Each implementation reads the hidden states in their own dtype: a float32 copy of them is [T, D], 134 MB for 8,192
tokens of LLaMA-2 7B, and a launch. ``tomoe::route_recorded`` also writes the experts to a buffer, as bytes. It is one
op because a copy after it would cost a step of a small model more than the routing itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.hf.tomoe_math import route as argmax_route
from tomoe_vllm.kernels.ops import LIBRARY, rejected_kernels


def route_reference(hidden_states: Tensor, router_weight: Tensor, record: Tensor | None = None) -> Tensor:
    """Plain torch, any device and dtype; see :func:`route`."""
    expert_ids = argmax_route(F.linear(hidden_states.float(), router_weight))
    if record is not None:
        record.narrow(0, 0, expert_ids.shape[0]).copy_(expert_ids)
    return expert_ids


def _route_cuda(hidden_states: Tensor, router_weight: Tensor, record: Tensor | None = None) -> Tensor:
    if "route" in rejected_kernels:
        return route_reference(hidden_states, router_weight, record)
    from tomoe_vllm.kernels.route.triton import route_triton  # needs Triton, which a CPU may lack

    return route_triton(hidden_states, router_weight, record)


for _name in ("route", "route_recorded"):
    LIBRARY.impl(_name, route_reference, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _route_cuda, "CUDA")


def route(hidden_states: Tensor, router_weight: Tensor, record: Tensor | None = None) -> Tensor:
    """Argmax of the router's float32 logits (eq. 3); of equal logits the first.

    ``hidden_states``: [T, D] float32, bfloat16 or float16; ``router_weight``: [N, D] float32; ``record``: [at least T]
    uint8, which receives the experts too (N at most 255), or None. Returns [T] int64.
    """
    if record is None:
        return torch.ops.tomoe.route.default(hidden_states, router_weight)
    return torch.ops.tomoe.route_recorded.default(hidden_states, router_weight, record)
