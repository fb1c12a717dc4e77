"""The MLP of ToMoE on one copy of the weights.

    out = sum over neurons n that the token's expert keeps of  act(x . gate_n) * (x . up_n) * down_n

Two ops of ``kernels/ops.py``, both opaque to torch.compile:

- ``tomoe::expert_mlp`` takes the weights as tensors: plain torch (``reference.py``), or Triton kernels on CUDA
  once ``triton.dispatch.register`` has run.
- ``tomoe::prepared_expert_mlp`` takes a handle: C++ for float32 on CPUs (``cpu/op.cpp``). The weights are checked once,
  by ``tomoe::prepare_experts``: in each call, checking them and reading eight tensor headers that are in no cache
  would take a measurable part of the time of one token of a small model (benchmarks/op_versions.py).
"""

import math
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_activation import require_activation
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.ops import LIBRARY, ExpertTensors


def _reference(hidden_states: Tensor, expert_ids: Tensor, *weights) -> Tensor:
    return expert_mlp_reference(hidden_states, expert_ids, ExpertTensors(*weights))


LIBRARY.impl("expert_mlp", _reference, "CompositeExplicitAutograd")


def _release(handle: Tensor) -> None:
    # Garbage may be collected while torch.compile traces. A plain call would be traced too, or fail, and the weights
    # would never be freed; the kernel is therefore called without torch's dispatch modes.
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    torch.ops.tomoe.release_experts.default.redispatch(cpu, handle)


@dataclass(frozen=True, eq=False)
class ExpertWeights(ExpertTensors):
    """:class:`ExpertTensors` whose shapes were checked, prepared for the C++ kernels where these can take them.

    ``handle``: what ``tomoe::prepare_experts`` returned, or None where the C++ kernels are not built or the weights
    are not float32 on a CPU. It is released with this object. Values in the tensors may change in place.

    Raises ``ValueError`` for an unknown activation or shapes that do not fit together.
    """

    handle: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        require_activation(self.activation)
        num_neurons, hidden_size = self.down.shape[0], math.prod(self.down.shape[1:])
        if self.up.shape not in ((num_neurons, hidden_size), (2 * num_neurons, hidden_size)):
            raise ValueError(
                f"up is {list(self.up.shape)}; for a down of {list(self.down.shape)} it must be "
                f"{[2 * num_neurons, hidden_size]} (gate and up) or {[num_neurons, hidden_size]} (no gate)"
            )
        if self.up_bias is not None and self.up_bias.shape != self.up.shape[:1]:
            raise ValueError(f"up_bias is {list(self.up_bias.shape)}; up has {self.up.shape[0]} rows")
        num_experts = len(self.widths)
        if self.masks.shape != (num_experts, num_neurons) or self.neuron_ids.shape[0] != num_experts:
            raise ValueError(
                f"masks is {list(self.masks.shape)} and neuron_ids has {self.neuron_ids.shape[0]} rows; for widths of "
                f"{num_experts} experts and {num_neurons} neurons they must be {[num_experts, num_neurons]} and "
                f"{num_experts}"
            )
        object.__setattr__(self, "handle", self._prepare())

    def _prepare(self) -> Tensor | None:
        is_for_cpp = self.up.device.type == "cpu" and self.up.dtype == torch.float32
        if not (is_for_cpp and build.load()):
            return None
        lists = self.neuron_ids, self.widths
        handle = torch.ops.tomoe.prepare_experts(self.up, self.up_bias, self.down, *lists, self.activation)
        weakref.finalize(self, _release, handle).atexit = False
        return handle

    def __reduce__(self) -> tuple:
        """Copies and unpickled objects are prepared again: a handle names the memory of one object in one process."""
        return type(self), self.flat()


def expert_mlp(hidden_states: Tensor, expert_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """Each token through its expert's neurons.

    ``hidden_states``: [T, D] of the weights' dtype; ``expert_ids``: [T] int64. Returns [T, D], without W_down's bias.
    Raises ``ValueError`` or ``RuntimeError`` for ``hidden_states`` of another width.
    """
    if weights.handle is not None:
        return torch.ops.tomoe.prepared_expert_mlp.default(hidden_states, expert_ids, weights.handle)
    if (width := hidden_states.size(-1)) != weights.up.size(1):
        raise ValueError(f"hidden_states has {width} columns; the weights have {weights.up.size(1)}")
    return torch.ops.tomoe.expert_mlp.default(hidden_states, expert_ids, *weights.flat())
