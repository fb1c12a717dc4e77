"""Random-experts baseline: neurons split at random into equal disjoint experts, with a trained top-k router.

Source: LLaMA-MoE (Zhu et al., arXiv 2406.16554), its best split ("Independent, random").

Kept: A uniformly random partition of each MLP's neurons into equal experts, a linear top-k router and a
balance loss. Gate values are the softmax over the selected logits times k, so that the mean weight of an
expert is 1, as in the dense sum.

Simplified: The dense weights stay frozen, and the router is trained by distillation on ToMoE's training
tokens. LLaMA-MoE trains all weights on 200 B tokens. There is no router noise. The balance loss is ToMoE's.
Attention stays dense and counts against the budget.

In favour of this baseline: Experts that are not selected also send the router a straight-through gradient
(they are computed anyway). Without it the router would not learn at k = 1.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomoe_training.artifacts.export import load_base_config
from tomoe_training.artifacts.training_state import check_state, load_state, save_state
from tomoe_training.base_model import load_base, use_causal_attention
from tomoe_training.budget import Widths
from tomoe_training.dtypes import to_device, training_dtype
from tomoe_training.evaluation.baselines.setup import BaselineSetup, MethodGates
from tomoe_training.evaluation.baselines.widths import equal_experts, mlp_width
from tomoe_training.method.losses import distillation_loss, load_balance_loss
from tomoe_training.run_folder import settings_of_result
from tomoe_training.terms import TermHistory
from tomoe_training.trainer import make_scheduler
from tomoe_vllm.hf.modeling_tomoe import ExpertGate

NUM_PROGRESS_LINES = 20
ROUTERS = "routers.pt"


class RandomExpertGate(ExpertGate):
    """Keeps the neurons of a token's top-k experts, weighted by the router."""

    def __init__(self, hidden_size: int, expert_of_neuron: Tensor, num_experts: int, top_k: int):
        """``expert_of_neuron``: [F] int64 in [0, num_experts)."""
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.register_buffer("expert_of_neuron", expert_of_neuron)

    def expert_weights(self, hidden_states: Tensor) -> Tensor:
        """Gate values of all experts, [T, N] float32: the top-k add up to k, the others are 0."""
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


def random_experts(setup: BaselineSetup) -> MethodGates:
    """Split the neurons, then train the routers on the run's tokens."""
    gates = split_at_random(setup)
    train_routers(setup, gates)
    gates.tokens = setup.training_tokens
    return gates


def split_at_random(setup: BaselineSetup) -> MethodGates:
    """The experts with untrained routers. Their number and k are those closest to the budget."""
    shape, num_layers, seed = setup.shape, len(setup.layers), setup.config.seed
    num_neurons = shape.intermediate_size
    width = mlp_width(shape, setup.config.active_ratio, shape.head_dim, shape.head_dim)
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


def train_routers(setup: BaselineSetup, gates: MethodGates) -> None:
    """Train the routers by distillation from the dense model: ToMoE's batches, optimizer, schedule and dtype.

    A separate loop on one process: trainer.py is specific to a student's masks and adapters. The state is saved
    to ``setup.work`` every ``checkpoint_every`` steps and at the end; a killed comparison resumes from it.
    Raises ``FloatingPointError`` for a loss that is not finite.
    """
    config = setup.config
    dtype = training_dtype(config.dtype, setup.base.device)
    folder = Path(config.base)
    base = load_base(folder, load_base_config(folder), dtype, setup.base.device, is_sharded=False)
    use_causal_attention(base, config.sequence_length)
    gates.attach(base)
    lm_head, routers = base.get_output_embeddings(), [p for gate in gates.experts for p in gate.parameters()]
    optimizer = torch.optim.AdamW(routers, lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = make_scheduler(config, optimizer)
    micro = min(config.micro_batch_size or config.batch_size, config.batch_size)
    starts = range(0, config.batch_size, micro)

    def hidden_states(ids: Tensor, is_on: bool) -> Tensor:
        gates.set_on(is_on)
        return base.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)

    file, run = setup.work / "random_experts" / ROUTERS, settings_of_result(config)
    state = load_state(file, base.device) or {"step": 0}
    if state["step"]:
        if state["run"] != run:
            raise ValueError(f"{file} was written for other settings; choose another --work or remove it")
        for router, trained in zip(routers, state["routers"], strict=True):
            router.data.copy_(trained)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    history, names = TermHistory(), ("task", "r_l")
    for step in range(state["step"], config.steps):
        sums = torch.zeros((), dtype=torch.float64, device=base.device)
        for start in starts:
            rows = range(start, min(start + micro, config.batch_size))
            ids = to_device(setup.blocks.batch(step, rows, config.batch_size), base.device)
            with torch.no_grad():
                teacher = hidden_states(ids, is_on=False)
            task = distillation_loss(hidden_states(ids, is_on=True), teacher, lm_head)
            r_l = load_balance_loss(
                torch.stack([gate.fractions for gate in gates.experts]),
                torch.stack([gate.probabilities for gate in gates.experts]),
            )
            share = len(rows) / config.batch_size
            ((task + config.gamma * r_l) * share).backward()
            sums = sums + torch.stack([task, r_l]).detach().double() * share
        history.add(step, names, sums)
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(routers, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        done = step + 1
        if done % config.checkpoint_every == 0 or done == config.steps:
            history.read()
            file.parent.mkdir(parents=True, exist_ok=True)
            state = {"step": done, "run": run, "routers": [router.detach() for router in routers]}
            state |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            check_state(state, done)
            save_state(state, file)
        if done % max(1, config.steps // NUM_PROGRESS_LINES) == 0:
            terms = history.read()
            setup.report(f"routers, step {done}/{config.steps}: task {terms['task']:.3f}, R_L {terms['r_l']:.3f}")
