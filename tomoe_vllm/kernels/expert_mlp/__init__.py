"""The MLP of ToMoE on one copy of the weights, as one op: ``tomoe::expert_mlp``.

    out = sum over neurons n that the token's expert keeps of  act(x . gate_n) * (x . up_n) * down_n

Rows are neurons in all matrices (W_down is kept transposed), so an expert is a list of rows, and one copy of the
weights serves all experts. What is read and in which order is decided inside; the op's shapes depend on those of its
inputs alone and it never waits for a device. The CUDA version has three ways, and ``thresholds`` say where it changes;
the C++ version goes by the tokens of each expert.

Versions: plain torch (``reference.py``, the truth, any device and dtype), C++ for float32 on CPUs (``op.cpp``,
from the moment ``kernels.build.load()`` succeeds). A CUDA version registers itself the same way, for key "CUDA".

On CPUs ``tomoe::prepare_experts`` checks a layer's weights once, and ``tomoe::prepared_expert_mlp`` takes what it made
instead of them: to one token of a small model, eight tensors that are in no cache cost more than it seems.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_activation import require_activation
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton.thresholds import Thresholds

_LIBRARY = torch.library.Library("tomoe", "FRAGMENT")
_LIBRARY.define(
    "expert_mlp(Tensor hidden_states, Tensor expert_ids, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
    "Tensor expert_masks, Tensor neuron_ids, Tensor widths, str activation, int gather_tokens, int grouped_tokens) "
    "-> Tensor"
)
_LIBRARY.define(
    "prepare_experts(Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor neuron_ids, Tensor widths, "
    "str activation) -> Tensor"
)
_LIBRARY.define("prepared_expert_mlp(Tensor hidden_states, Tensor expert_ids, Tensor prepared) -> Tensor")


def _reference(
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
    down_weight = down_weight.flatten(1)
    return expert_mlp_reference(hidden_states, expert_ids, up_weight, up_bias, down_weight, expert_masks, activation)


_LIBRARY.impl("expert_mlp", _reference, "CompositeExplicitAutograd")


@torch.library.register_fake("tomoe::expert_mlp", lib=_LIBRARY)
@torch.library.register_fake("tomoe::prepared_expert_mlp", lib=_LIBRARY)
def _fake(hidden_states: Tensor, *others: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def path_of(num_tokens: int, thresholds: Thresholds, device_type: str) -> str:
    """How the op takes so many tokens through the weights: "gather", "masked" or "grouped" on a GPU, "rows" (each
    expert's own, the one way there is) elsewhere."""
    if device_type != "cuda":
        return "rows"
    if num_tokens <= thresholds.gather_tokens:
        return "gather"
    return "grouped" if num_tokens >= thresholds.grouped_tokens else "masked"


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """A layer's experts on one copy of its weights, as :func:`expert_mlp` takes them.

    ``up``: [2F, D], the gate's rows first, or [F, D] without a gate; ``up_bias``: [2F] or [F], or None; ``down``:
    [F, D], one row per neuron, or on a CPU [F, panels, D / panels]
    (``weight_layout.empty_panels``); rows may lie apart; ``masks``: [N, F] of ones and
    zeros; ``neuron_ids``, ``widths``: the same as lists (``weight_layout.neuron_lists``);
    floats of one dtype. ``activation``: a Hugging Face ``hidden_act``; ``thresholds``: those of the device
    (``load_thresholds()``). ``prepared``: [bytes] uint8, all that as the C++ kernels take it, or None where there are
    none for it. Values in the tensors may change in place.

    Raises ``ValueError`` for an activation or shapes that the op cannot take.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    masks: Tensor
    neuron_ids: Tensor
    widths: Tensor
    activation: str
    thresholds: Thresholds
    prepared: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        require_activation(self.activation)
        num_neurons, hidden_size = self.down.shape[0], math.prod(self.down.shape[1:])
        if self.up.shape not in ((num_neurons, hidden_size), (2 * num_neurons, hidden_size)):
            raise ValueError(
                f"up is {list(self.up.shape)}; beside a down of {list(self.down.shape)} it must be "
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
        object.__setattr__(self, "prepared", self._prepare())

    def _prepare(self) -> Tensor | None:
        is_for_cpp = self.up.device.type == "cpu" and self.up.dtype == torch.float32
        if not (is_for_cpp and build.load()):
            return None
        return torch.ops.tomoe.prepare_experts(
            self.up, self.up_bias, self.down, self.neuron_ids, self.widths, self.activation
        )


def expert_mlp(hidden_states: Tensor, expert_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """Each token through its expert's neurons.

    ``hidden_states``: [T, D] of the weights' dtype; ``expert_ids``: [T] int64. Returns [T, D], without W_down's bias.
    Raises ``ValueError`` or ``RuntimeError`` for ``hidden_states`` of another width.
    """
    if weights.prepared is not None:
        return torch.ops.tomoe.prepared_expert_mlp.default(hidden_states, expert_ids, weights.prepared)
    if (width := hidden_states.size(-1)) != weights.up.size(1):
        raise ValueError(f"hidden_states has {width} columns; the weights have {weights.up.size(1)}")
    return torch.ops.tomoe.expert_mlp.default(
        hidden_states,
        expert_ids,
        weights.up,
        weights.up_bias,
        weights.down,
        weights.masks,
        weights.neuron_ids,
        weights.widths,
        weights.activation,
        weights.thresholds.gather_tokens,
        weights.thresholds.grouped_tokens,
    )
