"""Rival: neurons split at random into equal disjoint experts, with a trained top-k router.

Stands for: LLaMA-MoE (Zhu et al., arXiv 2406.16554), its best split ("Independent, random").
Kept: a uniformly random partition of each MLP's neurons into equal experts; a linear top-k router; gate
values are the softmax over the chosen logits, rescaled: times k, so that experts enter with weight 1 on
average, as in the dense sum; a balance loss on the router.
Simplified: the dense weights stay frozen and the router learns by distillation on the tokens that ToMoE
trains on, where LLaMA-MoE trains all weights on 200 B tokens; no noise in the router; the balance loss is
ToMoE's. In the rival's favour: experts that were not chosen get a straight-through gradient too (they are
computed anyway here), so that the router also learns from what it did not choose, and at k = 1 at all.
Attention stays dense and is paid for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tomoe_training.artifacts.files import load_state, save_state
from tomoe_training.budget import Widths
from tomoe_training.config import RunConfig
from tomoe_training.evaluation.baselines.setup import Contest, MethodGates
from tomoe_training.evaluation.baselines.widths import equal_experts, mlp_width
from tomoe_training.method.losses import distillation_loss, load_balance_loss
from tomoe_training.runtime import training_dtype
from tomoe_training.trainer import MAY_CHANGE, check_finite, make_scheduler
from tomoe_vllm.hf.modeling_tomoe import ExpertGate

REPORTS = 20
"""Lines of progress over a training."""


ROUTERS = "routers.pt"


class RandomExpertGate(ExpertGate):
    """Neurons of the top-k experts of a token, weighted by the router."""

    def __init__(self, hidden_size: int, expert_of_neuron: Tensor, num_experts: int, top_k: int):
        """``expert_of_neuron``: [F] int64 in [0, num_experts)."""
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.register_buffer("expert_of_neuron", expert_of_neuron)

    def expert_weights(self, hidden_states: Tensor) -> Tensor:
        """Gate value of every expert, [T, N] float32: zero but for the top-k, whose values add up to k."""
        logits = F.linear(hidden_states.float(), self.router.weight)
        best, chosen = logits.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, chosen, self.top_k * best.softmax(dim=-1))
        if not torch.is_grad_enabled():
            return weights
        soft = logits.softmax(dim=-1)
        is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
        self.fractions = is_chosen.float().flatten(0, -2).mean(dim=0) / self.top_k
        self.probabilities = soft.flatten(0, -2).mean(dim=0)
        return weights + (self.top_k * (soft - soft.detach())).masked_fill(is_chosen, 0.0)

    def neuron_mask(self, hidden_states: Tensor) -> Tensor:
        return self.expert_weights(hidden_states).to(hidden_states.dtype)[..., self.expert_of_neuron]


def random_experts(contest: Contest) -> MethodGates:
    """Split, then train the routers for the run's tokens."""
    gates = split_at_random(contest)
    train_routers(contest, gates)
    gates.tokens = contest.training_tokens
    return gates


def split_at_random(contest: Contest) -> MethodGates:
    """The experts, with untrained routers; number and k such that they come nearest to the budget."""
    shape, num_layers, seed = contest.shape, len(contest.layers), contest.config.seed
    num_neurons = shape.intermediate_size
    width = mlp_width(shape, contest.config.active_ratio, shape.head_dim, shape.head_dim)
    num_experts, top_k = equal_experts(num_neurons, width)
    size = num_neurons // num_experts
    generator = torch.Generator().manual_seed(seed)
    gates: list[ExpertGate] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(num_layers):
            experts = torch.empty(num_neurons, dtype=torch.long)
            experts[torch.randperm(num_neurons, generator=generator)] = torch.arange(num_neurons) // size
            gates.append(RandomExpertGate(shape.hidden_size, experts, num_experts, top_k))
    widths = Widths(
        experts=[top_k * size] * num_layers,
        qk_dims=[shape.head_dim] * num_layers,
        vo_dims=[shape.head_dim] * num_layers,
        shift=0.0,
    )
    return MethodGates(heads=[], experts=gates, widths=widths, tokens=0, note=f"{top_k} of {num_experts} experts")


def train_routers(contest: Contest, gates: MethodGates) -> None:
    """Train the routers by distillation from the dense model: ToMoE's batches, optimiser, schedule and dtype.

    A plain loop on one process: the trainer's own is about a student's masks and adapters, and nothing of that
    is here. Its state is kept in the contest's folder every ``checkpoint_every`` steps and at the end, and a
    killed comparison goes on from there. Raises ``FloatingPointError`` for a loss that is not finite.
    """
    config = contest.config
    dtype = training_dtype(config.dtype, contest.base.device)
    base = AutoModelForCausalLM.from_pretrained(config.base, dtype=dtype).eval().to(contest.base.device)
    base.requires_grad_(False)
    gates.attach(base)
    lm_head, routers = base.get_output_embeddings(), [p for gate in gates.experts for p in gate.parameters()]
    optimizer = torch.optim.AdamW(routers, lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = make_scheduler(config, optimizer)
    micro = min(config.micro_batch_size or config.batch_size, config.batch_size)
    starts = range(0, config.batch_size, micro)

    def hidden_states(ids: Tensor, is_on: bool) -> Tensor:
        gates.set_on(is_on)
        return base.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)

    file, run = contest.work / "random_experts" / ROUTERS, _settings_that_matter(config)
    state = load_state(file, base.device) or {"step": 0}
    if state["step"]:
        if state["run"] != run:
            raise ValueError(f"{file} was written for other settings; choose another --work or remove it")
        for router, trained in zip(routers, state["routers"], strict=True):
            router.data.copy_(trained)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    for step in range(state["step"], config.steps):
        terms = {"task": 0.0, "r_l": 0.0}
        for start in starts:
            rows = range(start, min(start + micro, config.batch_size))
            ids = contest.blocks.batch(step, rows, config.batch_size).to(base.device)
            with torch.no_grad():
                teacher = hidden_states(ids, is_on=False)
            task = distillation_loss(hidden_states(ids, is_on=True), teacher, lm_head)
            r_l = load_balance_loss(
                torch.stack([gate.fractions for gate in gates.experts]),
                torch.stack([gate.probabilities for gate in gates.experts]),
            )
            share = len(rows) / config.batch_size
            ((task + config.gamma * r_l) * share).backward()
            terms = {"task": terms["task"] + task.item() * share, "r_l": terms["r_l"] + r_l.item() * share}
        check_finite(terms, step)
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(routers, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        done = step + 1
        if done % config.checkpoint_every == 0 or done == config.steps:
            file.parent.mkdir(parents=True, exist_ok=True)
            state = {"step": done, "run": run, "routers": [router.detach() for router in routers]}
            save_state(state | {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
        if done % max(1, config.steps // REPORTS) == 0:
            contest.report(f"routers, step {done}/{config.steps}: task {terms['task']:.3f}, R_L {terms['r_l']:.3f}")


def _settings_that_matter(config: RunConfig) -> dict[str, Any]:
    settings = config.model_dump()
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE and name != "architecture"}
