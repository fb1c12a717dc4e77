"""Schemas of all ops in the ``tomoe`` namespace, and the groups of tensors that they take.

Implementations register themselves for these schemas: plain torch in each op's folder (any device), C++ for CPUs
(``build.load``), Triton for CUDA (``route``, ``value_mask``, ``expert_mlp/triton/dispatch.py``). This module imports
none of them, so each of them can import it.

    op                    shapes
    route                 [T, D], [N, D] -> [T] int64
    route_recorded        the same, and writes the experts to ``record`` [at least T] uint8
    mask_values           [T, H * A], [T, D], ValueRouter, width -> [T, H * A]
    expert_mlp            [T, D], [T] int64, ExpertTensors -> [T, D]
    prepare_experts       ExpertTensors (float32, CPU) -> handle
    prepared_expert_mlp   [T, D], [T] int64, handle -> [T, D]
    release_experts       handle -> nothing

T tokens, D hidden_size, F neurons, N experts, H heads, A head_dim. A handle is a small int64 tensor that names an entry
of a registry in the C++ library of this process; the entry owns the tensors until it is released.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("tomoe", "FRAGMENT")
"""Implementations in Python register with ``LIBRARY.impl``."""

rejected_kernels: set[str] = set()
"""Ops that run in plain torch on this GPU: ``device_check.check_on_device`` found their Triton kernels wrong."""

LIBRARY.define("route(Tensor hidden_states, Tensor router_weight) -> Tensor")
LIBRARY.define("route_recorded(Tensor hidden_states, Tensor router_weight, Tensor(a!) record) -> Tensor")
LIBRARY.define(
    "mask_values(Tensor attention, Tensor hidden_states, Tensor down_weight, Tensor down_bias, Tensor norm_weight, "
    "Tensor norm_bias, Tensor up_weight, int width) -> Tensor"
)
LIBRARY.define(
    "expert_mlp(Tensor hidden_states, Tensor expert_ids, Tensor up, Tensor? up_bias, Tensor down, Tensor masks, "
    "Tensor neuron_ids, Tensor widths, str activation) -> Tensor"
)
LIBRARY.define(
    "prepare_experts(Tensor up, Tensor? up_bias, Tensor down, Tensor neuron_ids, Tensor widths, str activation) "
    "-> Tensor"
)
LIBRARY.define("prepared_expert_mlp(Tensor hidden_states, Tensor expert_ids, Tensor handle) -> Tensor")
LIBRARY.define("release_experts(Tensor handle) -> ()")


@dataclass(frozen=True, eq=False)
class ExpertTensors:
    """A layer's experts on one copy of its weights; the fields are the last arguments of ``tomoe::expert_mlp``.

    Rows are neurons in all matrices, so an expert is a list of rows. Floats of one dtype; rows may be strided.

    - ``up``: [2F, D], the gate's rows first, or [F, D] without a gate; ``up_bias``: [2F] or [F], or None.
    - ``down``: W_down transposed, [F, D], or [F, panels, D / panels] (``weight_layout.empty_panels``).
    - ``masks``: [N, F], 1 where an expert keeps a neuron, else 0.
    - ``neuron_ids``: [N, W] int32 and ``widths``: [N] int32, the same as lists (``weight_layout.neuron_lists``).
    - ``activation``: a Hugging Face ``hidden_act``.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    masks: Tensor
    neuron_ids: Tensor
    widths: Tensor
    activation: str

    def flat(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, str]:
        """The fields in the order of the schema."""
        return self.up, self.up_bias, self.down, self.masks, self.neuron_ids, self.widths, self.activation

    def to(self, dtype: torch.dtype) -> "ExpertTensors":
        """The same with weights, bias and masks in ``dtype``."""
        up_bias = None if self.up_bias is None else self.up_bias.to(dtype)
        tensors = ExpertTensors(*self.flat())
        return replace(
            tensors, up=self.up.to(dtype), up_bias=up_bias, down=self.down.to(dtype), masks=self.masks.to(dtype)
        )


class ValueRouter(NamedTuple):
    """Weights of the value logits (eq. 5), all float32; R the rank. Arguments of ``tomoe::mask_values``, in order.

    ``down_weight``: [R, D]; ``down_bias``, ``norm_weight``, ``norm_bias``: [R]; ``up_weight``: [A, R].
    """

    down_weight: Tensor
    down_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    up_weight: Tensor


@torch.library.register_fake("tomoe::expert_mlp", lib=LIBRARY)
@torch.library.register_fake("tomoe::prepared_expert_mlp", lib=LIBRARY)
@torch.library.register_fake("tomoe::mask_values", lib=LIBRARY)
def _like_the_first_argument(first: Tensor, *others: object) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


@torch.library.register_fake("tomoe::route", lib=LIBRARY)
@torch.library.register_fake("tomoe::route_recorded", lib=LIBRARY)
def _one_expert_per_token(hidden_states: Tensor, *others: Tensor) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.int64)
