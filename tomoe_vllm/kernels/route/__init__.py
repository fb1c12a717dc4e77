"""``tomoe::route``: the expert of each token, on every device; in C++ on CPUs once ``kernels.native`` is loaded."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.hf.tomoe_math import route as argmax_route

_LIBRARY = torch.library.Library("tomoe", "FRAGMENT")
_LIBRARY.define("route(Tensor hidden_states, Tensor router_weight) -> Tensor")


def _route(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    return argmax_route(F.linear(hidden_states, router_weight))


_LIBRARY.impl("route", _route, "CompositeExplicitAutograd")


@torch.library.register_fake("tomoe::route", lib=_LIBRARY)
def _fake(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.int64)


def route(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """Argmax of the router's float32 logits (eq. 3).

    ``hidden_states``: [T, D], any float dtype; ``router_weight``: [N, D] float32. Returns [T] int64.
    """
    return torch.ops.tomoe.route(hidden_states.float(), router_weight)
