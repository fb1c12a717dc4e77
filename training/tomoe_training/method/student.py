"""The student: a frozen model with trained gates. With the gates off the same model is the teacher."""

import torch
from torch import Tensor, nn

from tomoe_training.artifacts.adapter import LayerAdapter
from tomoe_training.budget import NUM_QUANTILES, LayerLogits, Widths, shift_to_widths, solve_widths
from tomoe_training.config import MethodSettings
from tomoe_training.method.gates import NOISE_FREE, LayerNoise, TrainedExpertGate, TrainedHeadGate
from tomoe_training.method.hypernetwork import Hypernetwork
from tomoe_training.method.losses import (
    distillation_loss,
    language_model_loss,
    load_balance_loss,
    parameter_loss,
    union_loss,
)
from tomoe_training.method.relaxation import StepNoise
from tomoe_training.ranks import broadcast_module, broadcast_widths, mean_over_ranks, mean_with_local_gradient
from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of

QUANTILE_DECAY = 0.98
"""Running mean over about 50 steps: K follows the logits and not single batches."""


class Student(nn.Module):
    """Everything trainable, attached to a frozen base model by hooks.

    The base is not a submodule: state dict, optimizer and DDP see only what is trained.
    """

    def __init__(self, base, settings: MethodSettings):
        super().__init__()
        self.settings = settings
        self.shape = block_shape(base.config)
        num_layers, family = base.config.num_hidden_layers, family_of(base.config)
        self.hypernetwork = Hypernetwork(
            num_modules=2 * num_layers,
            num_experts=settings.num_experts,
            embedding_size=settings.value_router_dim,
            is_local=settings.local_embeddings,
        )
        self.head_gates = nn.ModuleList(TrainedHeadGate(base.config, i, settings) for i in range(num_layers))
        self.expert_gates = nn.ModuleList(TrainedExpertGate(base.config, i, settings) for i in range(num_layers))
        for name, parameter in self.named_parameters():
            if name.endswith("offset"):
                parameter.requires_grad_(settings.train_offsets)
        for layer, head, expert in zip(base.model.layers, self.head_gates, self.expert_gates, strict=True):
            head.attach(layer, family)
            expert.attach(layer, family)
        base.requires_grad_(False)
        self._base = (base,)  # in a tuple, nn.Module does not register it as a submodule
        # Quantiles of each layer's value logits over training tokens and dims, a running mean.
        self.register_buffer("value_quantiles", torch.zeros(num_layers, NUM_QUANTILES))
        self._step_quantiles: list[Tensor] = []
        # Layers that have some.
        self.value_rows: Tensor
        self.register_buffer("value_rows", torch.arange(num_layers), persistent=False)
        self.widths: Widths | None = None
        self.widths_are_frozen = False
        self.spans_ranks = True
        """Whether R_L and R_P are those of the batch of all processes, or of each forward pass."""

    @property
    def base(self):
        """The frozen dense model, with the gates attached."""
        return self._base[0]

    # ------------------------------------------------------------------------------------- forward
    def set_gates(self, is_on: bool) -> None:
        """True for the student, False for the teacher."""
        for gate in (*self.head_gates, *self.expert_gates):
            gate.is_on = is_on

    def make_masks(self, noise: StepNoise | None = None) -> None:
        """Compute the masks of one step; without noise they are deterministic."""
        embeddings = self.hypernetwork()
        for i, (head, expert) in enumerate(zip(self.head_gates, self.expert_gates, strict=True)):
            layer = NOISE_FREE if noise is None else _layer_noise(noise, i)
            head.make_masks(embeddings[2 * i], layer, self.widths)
            expert.make_masks(embeddings[2 * i + 1], layer, self.widths)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Hidden states after the final norm, [B, S, D], of the teacher or the student (:meth:`set_gates`)."""
        return self.base.model(input_ids=input_ids, use_cache=False).last_hidden_state

    def forward(self, input_ids: Tensor, noise: StepNoise | None = None) -> dict[str, Tensor]:
        """Objective of one batch [B, S]: ``loss`` with gradients, and its terms without."""
        settings = self.settings
        teacher = None
        if settings.objective == "kd":
            with torch.no_grad():
                self.set_gates(False)
                teacher = self.hidden_states(input_ids)
                self.set_gates(True)
        self.make_masks(noise)
        student = self.hidden_states(input_ids)
        lm_head = self.base.get_output_embeddings()
        if teacher is not None:
            task = distillation_loss(student.flatten(0, 1), teacher.flatten(0, 1), lm_head)
        else:
            task = language_model_loss(student[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), lm_head)
        self._record_quantiles()
        return self._objective(task)

    def _objective(self, task: Tensor) -> dict[str, Tensor]:
        settings, heads, experts = self.settings, self.head_gates, self.expert_gates
        vo_widths = torch.stack([h.vo_width for h in heads])
        fractions = torch.stack([e.fractions for e in experts])
        if self.spans_ranks:
            vo_widths, fractions = mean_with_local_gradient(vo_widths), mean_with_local_gradient(fractions)
        r_p, ratio = parameter_loss(
            [h.qk_width for h in heads],
            list(vo_widths),
            [e.masks.sum(dim=-1).amax() for e in experts],
            self.shape,
            settings.active_ratio,
        )
        r_u, union = union_loss([e.clean_masks for e in experts])
        r_l = load_balance_loss(fractions, torch.stack([e.probabilities for e in experts]))
        loss = task + settings.beta * r_u + settings.gamma * r_l
        if self.widths is None:
            loss = loss + settings.alpha * r_p
        terms = {"task": task, "r_p": r_p, "r_u": r_u, "r_l": r_l, "active_ratio": ratio, "union": union}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def broadcast(self) -> None:
        """Copy parameters, buffers and widths of the first process to all others."""
        broadcast_module(self)
        self.widths = broadcast_widths(self.widths, len(self.head_gates), self.value_quantiles.device)

    # ---------------------------------------------------------------------------------- the result
    @torch.no_grad()
    def layer_logits(self) -> list[LayerLogits]:
        """Noise-free mask logits of every layer. Value quantiles need :meth:`calibrate` or training first.

        With frozen widths the logits are shifted, each expert by a constant, so that exactly the trained widths
        are above the threshold. Training determines the ranks of the logits; their levels may drift.
        """
        embeddings = self.hypernetwork()
        layers = []
        for i, (head, expert) in enumerate(zip(self.head_gates, self.expert_gates, strict=True)):
            query_key, value = head.static_logits(head.mean_embedding(embeddings[2 * i]))
            if self.settings.vo_mode == "dynamic":
                value = self.value_quantiles[i]
            logits = LayerLogits(experts=expert.logits(embeddings[2 * i + 1]), query_key=query_key, value=value)
            if self.widths_are_frozen and self.widths is not None:
                logits = shift_to_widths(logits, self.shape, self.widths, i)
            layers.append(logits)
        return layers

    @torch.no_grad()
    def calibrate(self, batch: Tensor) -> None:
        """Initialize the quantiles of the value logits from a batch [B, S] of training text.

        They determine K of the top-K. Training updates them by a running mean.
        """
        self.set_gates(True)
        self.make_masks()
        self.hidden_states(batch)
        self._record_quantiles()
        self.update_quantiles(decay=0.0)

    def _record_quantiles(self) -> None:
        """Store the quantiles of this forward pass until the step ends."""
        if self.settings.vo_mode == "dynamic":
            quantiles = [head.batch_quantiles for head in self.head_gates if not head.keeps_value]
            if quantiles:
                self._step_quantiles.append(torch.stack(quantiles))

    @torch.no_grad()
    def update_quantiles(self, decay: float = QUANTILE_DECAY) -> None:
        """Once per optimizer step: move the running quantiles towards the mean over its forward passes."""
        if self._step_quantiles:
            mean = mean_over_ranks(torch.stack(self._step_quantiles).mean(dim=0))
            running = self.value_quantiles.index_select(0, self.value_rows)
            self.value_quantiles.index_copy_(0, self.value_rows, torch.lerp(mean, running, decay))
        self._step_quantiles.clear()

    @torch.no_grad()
    def update_widths(self) -> Widths:
        """Set the widths of the masks to those that export would choose now, and return them.

        All processes get those of the first one: a rounding difference of the logits must not give two models.
        """
        settings = self.settings
        widths = solve_widths(
            self.layer_logits(),
            self.shape,
            settings.active_ratio,
            width_multiple=settings.width_multiple,
            head_dim_multiple=settings.head_dim_multiple,
        )
        self.widths = broadcast_widths(widths, len(self.head_gates), self.value_quantiles.device)
        assert self.widths is not None
        return self.widths

    def freeze_widths(self) -> None:
        """Do not change the widths from now on."""
        assert self.widths is not None
        self.widths_are_frozen = True
        for head in self.head_gates:
            head.freeze_widths(self.widths)
        rows = [i for i, head in enumerate(self.head_gates) if not head.keeps_value]
        self.value_rows = torch.tensor(rows, dtype=torch.long, device=self.value_rows.device)

    @torch.no_grad()
    def layer_adapters(self) -> list[LayerAdapter]:
        """The trained tensors in the form that an adapter stores."""
        embeddings, layers = self.hypernetwork(), []
        pairs = zip(self.head_gates, self.expert_gates, self.layer_logits(), strict=True)
        for i, (head, expert, logits) in enumerate(pairs):
            layer = LayerAdapter(logits=logits, router=expert.router.weight)
            if self.settings.vo_mode == "dynamic":
                layer.value_down, layer.value_up = head.value_down.weight, head.value_up.weight
                layer.value_bias = head.mean_embedding(embeddings[2 * i])
                layer.value_norm_weight, layer.value_norm_bias = head.norm.weight, head.norm.bias
            layers.append(layer)
        return layers

    @torch.no_grad()
    def load_layer_adapters(self, layers: list[LayerAdapter]) -> None:
        """Initialize from an adapter: copy its routers, and set offsets to the difference of the logits.

        Afterwards the deterministic masks are those of the adapter.
        """
        for i, (head, layer) in enumerate(zip(self.head_gates, layers, strict=True)):
            if self.settings.vo_mode == "dynamic":
                head.value_down.weight.copy_(layer.value_down)
                head.value_up.weight.copy_(layer.value_up)
                head.norm.weight.copy_(layer.value_norm_weight)
                head.norm.bias.copy_(layer.value_norm_bias)
                self.value_quantiles[i].copy_(layer.logits.value)
        embeddings, device = self.hypernetwork(), self.value_quantiles.device
        for i, (head, expert, layer) in enumerate(zip(self.head_gates, self.expert_gates, layers, strict=True)):
            if self.settings.vo_mode == "dynamic":
                assert layer.value_bias is not None
                head.embedding_offset.add_(layer.value_bias.to(device) - head.mean_embedding(embeddings[2 * i]))
            query_key, value = head.static_logits(head.mean_embedding(embeddings[2 * i]))
            head.query_key_offset.add_(layer.logits.query_key.to(device) - query_key)
            if value is not None:
                assert layer.logits.value is not None
                head.value_offset.add_(layer.logits.value.to(device) - value)
            expert.router.weight.copy_(layer.router)
            expert.offset.add_(layer.logits.experts.to(device) - expert.logits(embeddings[2 * i + 1]))


def _layer_noise(noise: StepNoise, i: int) -> LayerNoise:
    parts = (noise.experts, noise.query_key, noise.router, noise.value)
    return LayerNoise(*(None if part is None else part[i] for part in parts))
