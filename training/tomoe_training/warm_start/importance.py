"""Importance of each neuron and head dim: the diagonal of the Fisher information of its mask.

To second order around the dense model, dropping a unit changes the model's distribution by

    KL(p_dense || p_masked) ~ 1/2 E[(d log p(y) / d m)^2],    y sampled from p_dense,

where m is the unit's mask (1 in the dense model). The derivative is activation times gradient at the tensor that
the mask multiplies. One forward and one backward pass through the frozen model compute it for every token. Unlike
magnitudes, it includes the effect of later layers, and all layers and kinds of units are on one scale, in nats.
:func:`tomoe_training.budget.allocate_widths` divides the budget by it.

Limits: no cross terms between units, and an expansion around the dense model only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.hf.configuration_tomoe import family_of
from tomoe_vllm.hf.tomoe_math import BlockShape

SAMPLED_TOKENS = 128
"""Tokens whose labels are sampled at once. Another number gives other samples, and so another warm start."""


@dataclass(frozen=True, kw_only=True)
class LayerImportance:
    """Inputs of one layer's routers, and importance of its units, on T tokens of text. On the model's device."""

    attention_in: Tensor  # [T, D] bfloat16
    mlp_in: Tensor  # [T, D] bfloat16
    neurons: Tensor  # [T, F] bfloat16, squared derivative per token
    value: Tensor  # [T, A] float32; derivatives are summed over heads before squaring: heads share the mask
    query_key: Tensor  # [U] float32, mean per token; summed over a sequence before squaring: the mask is static


def measure_importance(
    student, batches: list[Tensor], seed: int = 0, layers: range | None = None
) -> list[LayerImportance]:
    """Importance in some layers (default: all) of the student's base model on ``batches`` of [B, S] tokens.

    Every call runs the whole model, forward and backward, with the same sampled labels.
    """
    base, layers = student.base, range(len(student.head_gates)) if layers is None else layers
    recorders = {i: _Recorder(student.head_gates[i].units, student.shape) for i in layers}
    handles = [
        handle
        for i, recorder in recorders.items()
        for handle in recorder.attach(base.model.layers[i], family_of(base.config))
    ]
    student.set_gates(False)
    generator = torch.Generator(batches[0].device).manual_seed(seed)
    num_tokens = 0
    try:
        with torch.enable_grad():
            for batch in batches:
                embeddings = base.get_input_embeddings()(batch).detach().requires_grad_()
                hidden = base.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
                hidden.backward(_sampled_gradient(hidden.detach(), base.get_output_embeddings(), generator))
                num_tokens += batch.numel()
    finally:
        student.set_gates(True)
        for handle in handles:
            handle.remove()
    return [recorder.result(num_tokens) for recorder in recorders.values()]


@torch.no_grad()
def _sampled_gradient(hidden: Tensor, lm_head, generator: torch.Generator) -> Tensor:
    """d(-log p(y)) / d hidden with y sampled from the model: [B, S, D]."""
    flat = hidden.flatten(0, -2)
    gradient = torch.empty_like(flat)
    for start in range(0, len(flat), SAMPLED_TOKENS):
        rows = slice(start, start + SAMPLED_TOKENS)
        p = F.softmax(F.linear(flat[rows], lm_head.weight, lm_head.bias).float(), dim=-1)
        sampled = torch.multinomial(p, 1, generator=generator)
        p.scatter_add_(1, sampled, -torch.ones_like(sampled, dtype=p.dtype))
        gradient[rows] = p.to(lm_head.weight.dtype) @ lm_head.weight
    return gradient.view_as(hidden)


class _Recorder:
    """Hooks of one layer. They record in the backward pass: gradient checkpointing runs the forward pass twice."""

    def __init__(self, units: Tensor, shape: BlockShape):
        self.units, self.head_dim = units, shape.head_dim
        self.parts: dict[str, list[Tensor]] = {"attention_in": [], "mlp_in": [], "neurons": [], "value": []}
        self.query_key = torch.zeros(shape.num_units, device=units.device)
        self._pending: Tensor | None = None

    def attach(self, layer, family) -> list:
        """Add hooks to the tensors that the gates' masks multiply."""
        return [
            layer.get_submodule(family.attention_in).register_forward_pre_hook(self._record_input("attention_in")),
            layer.get_submodule(family.mlp_in).register_forward_pre_hook(self._record_input("mlp_in")),
            layer.get_submodule(family.mlp_out).register_forward_pre_hook(_on_gradient(self._record_neurons)),
            layer.get_submodule(family.attention_out).register_forward_pre_hook(_on_gradient(self._record_value)),
            layer.get_submodule(family.query).register_forward_hook(_on_gradient(self._record_query_key)),
            layer.get_submodule(family.key).register_forward_hook(_on_gradient(self._record_query_key)),
        ]

    def result(self, num_tokens: int) -> LayerImportance:
        # Freed while concatenating: the records of a large model are never held twice.
        whole = {name: torch.cat(self.parts.pop(name)) for name in list(self.parts)}
        return LayerImportance(query_key=self.query_key / num_tokens, **whole)

    def _record_input(self, name: str) -> Callable:
        def record(values: Tensor, gradient: Tensor) -> None:
            self.parts[name].append(values.flatten(0, -2).to(torch.bfloat16))

        return _on_gradient(record)

    def _record_neurons(self, values: Tensor, gradient: Tensor) -> None:
        derivative = (values * gradient).float()
        self.parts["neurons"].append(derivative.square().flatten(0, -2).to(torch.bfloat16))

    def _record_value(self, values: Tensor, gradient: Tensor) -> None:
        derivative = (values * gradient).float()
        shared = derivative.unflatten(-1, (-1, self.head_dim)).sum(dim=-2)
        self.parts["value"].append(shared.square().flatten(0, -2))

    def _record_query_key(self, values: Tensor, gradient: Tensor) -> None:
        """Add the derivatives of Q and K of each sequence: one mask multiplies both."""
        derivative = (values * gradient).float()
        dims = derivative.flatten(2).unflatten(-1, (-1, self.head_dim)).sum(dim=(1, 2))  # [B, S, H, A] -> [B, A]
        if self._pending is None:
            self._pending = dims
            return
        dims, self._pending = dims + self._pending, None
        shared = dims.new_zeros(len(dims), len(self.query_key)).index_add_(1, self.units, dims)
        self.query_key += shared.square().sum(dim=0)


def _on_gradient(record: Callable[[Tensor, Tensor], None]) -> Callable:
    """A forward (pre-)hook that calls ``record(values, gradient)`` when the gradient of the values is computed."""

    def hook(module, args, output=None):
        values = args[0] if output is None else output
        if values.requires_grad:
            detached = values.detach()
            values.register_hook(lambda gradient: record(detached, gradient))

    return hook
