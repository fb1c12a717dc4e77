"""``tomoe::route``: the expert of each token. Plain torch on any device; C++ on CPUs after ``build.load()``.

``tomoe::route_recorded`` also writes the experts to a buffer, as bytes. It is one op because a copy after it would cost
a step of a small model more than the routing itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.hf.tomoe_math import route as argmax_route
from tomoe_vllm.kernels.ops import LIBRARY


def _route(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    return argmax_route(F.linear(hidden_states, router_weight))


def _route_recorded(hidden_states: Tensor, router_weight: Tensor, record: Tensor) -> Tensor:
    expert_ids = _route(hidden_states, router_weight)
    record.narrow(0, 0, expert_ids.shape[0]).copy_(expert_ids)
    return expert_ids


LIBRARY.impl("route", _route, "CompositeExplicitAutograd")
LIBRARY.impl("route_recorded", _route_recorded, "CompositeExplicitAutograd")


def route(hidden_states: Tensor, router_weight: Tensor, record: Tensor | None = None) -> Tensor:
    """Argmax of the router's float32 logits (eq. 3).

    ``hidden_states``: [T, D], any float dtype; ``router_weight``: [N, D] float32; ``record``: [at least T] uint8,
    which receives the experts too (N at most 255), or None. Returns [T] int64.
    """
    if record is None:
        return torch.ops.tomoe.route.default(hidden_states.float(), router_weight)
    return torch.ops.tomoe.route_recorded.default(hidden_states.float(), router_weight, record)
