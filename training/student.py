"""Teacher and student in one frozen model: gates off, gates on."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of
from training.budget import NUM_QUANTILES, LayerLogits, Widths
from training.gates import NOISE_FREE, LayerNoise, TrainedExpertGate, TrainedHeadGate
from training.hypernetwork import Hypernetwork
from training.losses import (
    distillation_loss,
    language_model_loss,
    load_balance_loss,
    parameter_loss,
    union_loss,
)
from training.relaxation import StepNoise


@dataclass(kw_only=True, slots=True)
class MethodSettings:
    """What is trained, and the objective (eq. 10)."""

    active_ratio: float = 0.5
    num_experts: int = 8
    router_dim: int = 128
    vo_mode: str = "dynamic"
    tau: float = 0.4
    local_embeddings: bool = False
    train_offsets: bool = False
    objective: str = "kd"  # or "lm"
    alpha: float = 16.0
    beta: float = 2.0
    gamma: float = 1.0


class Student(nn.Module):
    """Everything trainable, attached to a frozen base model by hooks.

    The base is not a submodule: state dict, optimiser and DDP see only what is trained.
    """

    def __init__(self, base, settings: MethodSettings):
        super().__init__()
        self.settings = settings
        self.shape = block_shape(base.config)
        num_layers, family = base.config.num_hidden_layers, family_of(base.config)
        common = dict(router_dim=settings.router_dim, tau=settings.tau)
        self.hypernetwork = Hypernetwork(
            num_modules=2 * num_layers,
            num_experts=settings.num_experts,
            embedding_size=settings.router_dim,
            is_local=settings.local_embeddings,
        )
        self.head_gates = nn.ModuleList(
            TrainedHeadGate(base.config, i, vo_mode=settings.vo_mode, **common) for i in range(num_layers)
        )
        self.expert_gates = nn.ModuleList(
            TrainedExpertGate(base.config, i, num_experts=settings.num_experts, **common) for i in range(num_layers)
        )
        for name, parameter in self.named_parameters():
            if name.endswith("offset"):
                parameter.requires_grad_(settings.train_offsets)
        for layer, head, expert in zip(base.model.layers, self.head_gates, self.expert_gates, strict=True):
            head.attach(layer, family)
            expert.attach(layer, family)
        base.requires_grad_(False)
        object.__setattr__(self, "base", base)
        self.widths: Widths | None = None

    # ------------------------------------------------------------------------------------- forward
    def set_gates(self, is_on: bool) -> None:
        """True for the student, False for the teacher."""
        for gate in (*self.head_gates, *self.expert_gates):
            gate.is_on = is_on

    def begin(self, noise: StepNoise | None = None) -> None:
        """Make the masks of one step; without noise they are the deterministic ones."""
        embeddings = self.hypernetwork()
        for i, (head, expert) in enumerate(zip(self.head_gates, self.expert_gates, strict=True)):
            layer = NOISE_FREE if noise is None else _layer_noise(noise, i, embeddings.device)
            head.begin(embeddings[2 * i], layer, self.widths)
            expert.begin(embeddings[2 * i + 1], layer, self.widths)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Hidden states after the final norm, [B, S, D], of teacher or student as the gates are set."""
        return self.base.model(input_ids=input_ids, use_cache=False).last_hidden_state

    def forward(self, input_ids: Tensor, noise: StepNoise | None = None) -> dict[str, Tensor]:
        """The objective of one batch [B, S]: ``loss`` with gradients, and its terms for the log."""
        settings = self.settings
        teacher = None
        if settings.objective == "kd":
            with torch.no_grad():
                self.set_gates(False)
                teacher = self.hidden_states(input_ids)
                self.set_gates(True)
        self.begin(noise)
        student = self.hidden_states(input_ids)
        lm_head = self.base.get_output_embeddings()
        if teacher is not None:
            task = distillation_loss(student.flatten(0, 1), teacher.flatten(0, 1), lm_head)
        else:
            task = language_model_loss(student[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), lm_head)
        return self._objective(task)

    def _objective(self, task: Tensor) -> dict[str, Tensor]:
        settings, heads, experts = self.settings, self.head_gates, self.expert_gates
        r_p, ratio = parameter_loss(
            [h.qk_width for h in heads],
            [_across_ranks(h.vo_width) for h in heads],
            [e.masks.sum(dim=-1).max() for e in experts],
            self.shape,
            settings.active_ratio,
        )
        r_u, union = union_loss([e.clean_masks for e in experts])
        fractions = _across_ranks(torch.stack([e.fractions for e in experts]))
        r_l = load_balance_loss(fractions, torch.stack([e.probabilities for e in experts]))
        loss = task + settings.beta * r_u + settings.gamma * r_l
        if self.widths is None:
            loss = loss + settings.alpha * r_p
        terms = {"task": task, "r_p": r_p, "r_u": r_u, "r_l": r_l, "active_ratio": ratio, "union": union}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    # ---------------------------------------------------------------------------------- the result
    @torch.no_grad()
    def layer_logits(self) -> list[LayerLogits]:
        """Noise-free mask logits of every layer; value quantiles need :meth:`calibrate` first."""
        embeddings = self.hypernetwork()
        layers = []
        for i, (head, expert) in enumerate(zip(self.head_gates, self.expert_gates, strict=True)):
            query_key, value = head.static_logits(head.mean_embedding(embeddings[2 * i]))
            if self.settings.vo_mode == "dynamic":
                value = self.value_quantiles[i]
            layers.append(LayerLogits(experts=expert.logits(embeddings[2 * i + 1]), query_key=query_key, value=value))
        return layers

    @torch.no_grad()
    def calibrate(self, batches: list[Tensor]) -> None:
        """Measure the distribution of value logits on training text: K of the top-K comes from it."""
        if self.settings.vo_mode != "dynamic":
            return
        for head in self.head_gates:
            head.record_value_logits = []
        self.set_gates(True)
        self.begin()
        for batch in batches:
            self.hidden_states(batch)
        points = torch.linspace(0, 1, NUM_QUANTILES)
        self.value_quantiles = []
        for head in self.head_gates:
            values = torch.cat([v.flatten() for v in head.record_value_logits]).float().cpu().sort().values
            self.value_quantiles.append(values[(points * (len(values) - 1)).long()])
            head.record_value_logits = None


def _layer_noise(noise: StepNoise, i: int, device: torch.device) -> LayerNoise:
    parts = (noise.experts, noise.query_key, noise.router, noise.value)
    return LayerNoise(*(None if part is None else part[i].to(device) for part in parts))


def _across_ranks(value: Tensor) -> Tensor:
    """Mean over processes with the local gradient: DDP then averages the gradients to that of the mean."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return value + (mean / dist.get_world_size() - value.detach())
