"""How much each neuron and head dim matters: the diagonal of the Fisher information of its mask.

Dropping a unit changes the model's distribution by, to second order around the dense model,

    KL(p_dense || p_masked) ~ 1/2 E[(d log p(y) / d m)^2],    y drawn from p_dense,

m being the unit's mask (1 in the dense model). The derivative is activation times gradient at the place
where the mask multiplies, so one forward and one backward pass through the frozen model give it for every
token. It knows what magnitudes do not: what later layers make of a unit, and how units of different layers
and kinds compare, in nats. That is what widths are divided by (:func:`tomoe_training.budget.allocate_widths`).

What it gives up: units are taken one at a time (no cross terms), around the dense model only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_training.method.losses import KD_CHUNK_TOKENS
from tomoe_vllm.hf.configuration_tomoe import family_of


@dataclass(frozen=True, kw_only=True)
class LayerImportance:
    """What one layer's routers read, and what its units matter, on T tokens of text. On the CPU."""

    attention_in: Tensor  # [T, D] bfloat16
    mlp_in: Tensor  # [T, D] bfloat16
    neurons: Tensor  # [T, F] bfloat16, squared derivative per token
    value: Tensor  # [T, A] float32, the heads' derivatives added before squaring: they share the mask
    query_key: Tensor  # [U] float32, mean per token; summed over a sequence before squaring: its mask is static


def measure_importance(student, batches: list[Tensor], seed: int = 0) -> list[LayerImportance]:
    """Importance in every layer of a student's dense model on ``batches`` of [B, S] tokens."""
    base = student.base
    recorders = [_Recorder(head.units, student.shape.head_dim) for head in student.head_gates]
    handles = [
        handle
        for layer, recorder in zip(base.model.layers, recorders, strict=True)
        for handle in recorder.attach(layer, family_of(base.config))
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
    return [recorder.result(num_tokens) for recorder in recorders]


@torch.no_grad()
def _sampled_gradient(hidden: Tensor, lm_head, generator: torch.Generator) -> Tensor:
    """d(-log p(y)) / d hidden with y drawn from the model itself: [B, S, D]."""
    flat = hidden.flatten(0, -2)
    gradient = torch.empty_like(flat)
    for start in range(0, len(flat), KD_CHUNK_TOKENS):
        rows = slice(start, start + KD_CHUNK_TOKENS)
        p = F.softmax(F.linear(flat[rows], lm_head.weight, lm_head.bias).float(), dim=-1)
        drawn = torch.multinomial(p, 1, generator=generator)
        p.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=p.dtype))
        gradient[rows] = p.to(lm_head.weight.dtype) @ lm_head.weight
    return gradient.view_as(hidden)


class _Recorder:
    """Hooks of one layer. All record in the backward pass: a layer under gradient checkpointing runs forward twice."""

    def __init__(self, units: Tensor, head_dim: int):
        self.units, self.head_dim = units, head_dim
        self.parts: dict[str, list[Tensor]] = {"attention_in": [], "mlp_in": [], "neurons": [], "value": []}
        self.query_key = torch.zeros(int(units.max()) + 1)
        self._pending: Tensor | None = None

    def attach(self, layer, family) -> list:
        """Hook the places where the gates' masks multiply."""
        return [
            layer.get_submodule(family.attention_in).register_forward_pre_hook(self._keep("attention_in")),
            layer.get_submodule(family.mlp_in).register_forward_pre_hook(self._keep("mlp_in")),
            layer.get_submodule(family.mlp_out).register_forward_pre_hook(_on_gradient(self._see_neurons)),
            layer.get_submodule(family.attention_out).register_forward_pre_hook(_on_gradient(self._see_value)),
            layer.get_submodule(family.query).register_forward_hook(_on_gradient(self._see_query_key)),
            layer.get_submodule(family.key).register_forward_hook(_on_gradient(self._see_query_key)),
        ]

    def result(self, num_tokens: int) -> LayerImportance:
        # Freed as they are joined: of a large model's record there is never a second copy.
        whole = {name: torch.cat(self.parts.pop(name)) for name in list(self.parts)}
        return LayerImportance(query_key=self.query_key / num_tokens, **whole)

    def _keep(self, name: str) -> Callable:
        def see(values: Tensor, gradient: Tensor) -> None:
            self.parts[name].append(values.flatten(0, -2).to("cpu", torch.bfloat16))

        return _on_gradient(see)

    def _see_neurons(self, values: Tensor, gradient: Tensor) -> None:
        derivative = (values * gradient).float()
        self.parts["neurons"].append(derivative.square().flatten(0, -2).to("cpu", torch.bfloat16))

    def _see_value(self, values: Tensor, gradient: Tensor) -> None:
        derivative = (values * gradient).float()
        shared = derivative.unflatten(-1, (-1, self.head_dim)).sum(dim=-2)
        self.parts["value"].append(shared.square().flatten(0, -2).cpu())

    def _see_query_key(self, values: Tensor, gradient: Tensor) -> None:
        """Q's and K's derivatives of each sequence meet here: one mask multiplies both."""
        derivative = (values * gradient).float()
        dims = derivative.flatten(2).unflatten(-1, (-1, self.head_dim)).sum(dim=(1, 2))  # [B, S, H, A] -> [B, A]
        if self._pending is None:
            self._pending = dims
            return
        dims, self._pending = dims + self._pending, None
        shared = dims.new_zeros(len(dims), len(self.query_key)).index_add_(1, self.units, dims)
        self.query_key += shared.square().sum(dim=0).cpu()


def _on_gradient(see: Callable[[Tensor, Tensor], None]) -> Callable:
    """A forward (pre-)hook that calls ``see(values, gradient)`` once the gradient of the values is there."""

    def hook(module, args, output=None):
        values = args[0] if output is None else output
        if values.requires_grad:
            detached = values.detach()
            values.register_hook(lambda gradient: see(detached, gradient))

    return hook
