"""A warm start: routers and mask logits from activation statistics of a little training text.

A cold start collapses: eight experts that begin equal stay copies of one static mask, because the union
loss is satisfied by their noise (docs/method.md). Here the experts begin as what they should become:

1. tokens of each MLP are clustered by which neurons they excite (spherical k-means with equal sizes);
2. the router is fitted to predict the cluster from the MLP's input (softmax regression);
3. a neuron's logit for an expert is its importance to that cluster's tokens, mean h^2 |W_down[:, f]|^2,
   as a rank turned into a normal score, so that every layer starts equally wide.

Q/K units and V/O dims are ranked likewise. The logits sit in the gates' offsets, where they are held
fixed or trained on, and the hypernetwork learns what to add.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.hf.configuration_tomoe import family_of
from tomoe_vllm.hf.tomoe_math import GUMBEL_MEDIAN, KEEP_BIAS
from training.student import Student

KMEANS_ITERATIONS = 15
ROUTER_ITERATIONS = 150


@torch.no_grad()
def warm_start(student: Student, batches: list[Tensor], *, scale: float = 2.0, attention_ratio: float = 0.85) -> None:
    """Set routers and offsets of a student from teacher activations on ``batches`` of [B, S] tokens.

    ``scale`` is the spread of the logits (standard deviation within a layer); ``attention_ratio`` the share
    of attention dims that starts above the threshold, the MLPs taking what the budget leaves.
    """
    shape, p = student.shape, student.settings.active_ratio
    attention = shape.active_parameters(shape.head_dim, shape.head_dim, 0)
    mlp = shape.active_parameters(0, 0, shape.intermediate_size)
    attention_ratio = max(attention_ratio, p) if student.settings.vo_mode != "none" else 1.0
    mlp_ratio = min(max((p * (attention + mlp) - attention_ratio * attention) / mlp, 0.05), 0.98)
    for layer_idx, sample in enumerate(_record(student, batches)):
        head, expert = student.head_gates[layer_idx], student.expert_gates[layer_idx]
        labels = _cluster(sample["neurons"], student.settings.num_experts)
        expert.router.weight.copy_(_fit_router(sample["mlp_in"], labels, student.settings.num_experts))
        energy = sample["neurons"].square()
        importance = torch.stack([energy[labels == i].mean(dim=0) for i in range(student.settings.num_experts)])
        expert.offset.copy_(_normal_logits(importance, mlp_ratio, scale))
        expert.up.weight.mul_(0.1)
        units = torch.zeros(shape.num_units).index_add_(0, head.units.cpu(), sample["query_key"])
        head.query_key_offset.copy_(_normal_logits(units, attention_ratio, scale))
        head.query_key_up.weight.mul_(0.1)
        value = _normal_logits(sample["value"], attention_ratio, scale)
        if student.settings.vo_mode == "static":
            head.value_offset.copy_(value)
            head.value_up.weight.mul_(0.1)
        elif student.settings.vo_mode == "dynamic":
            _fit_value_router(head, sample["attention_in"], sample["value_energy"], value, attention_ratio, scale)


def _normal_logits(importance: Tensor, keep_ratio: float, scale: float) -> Tensor:
    """Ranks as normal scores, ``keep_ratio`` of them above the deterministic threshold."""
    size = importance.shape[-1]
    ranks = importance.argsort(dim=-1).argsort(dim=-1).float()
    scores = torch.special.ndtri((ranks + 0.5) / size)
    keep_ratio = min(keep_ratio, 1 - 0.25 / size)  # all kept, and the logits finite
    cut = torch.special.ndtri(torch.tensor(1 - keep_ratio))
    return scale * (scores - cut) - (KEEP_BIAS + GUMBEL_MEDIAN)


def _record(student: Student, batches: list[Tensor]):
    """Teacher activations, one layer at a time: yields dicts of float32 CPU tensors."""
    base, family, shape = student.base, family_of(student.base.config), student.shape
    store: list[dict[str, list[Tensor]]] = []
    handles = []
    for layer in base.model.layers:
        sample: dict[str, list[Tensor]] = {}
        store.append(sample)

        def keep(name: str, sample=sample, is_output=False):
            def hook(module, args, output):
                value = output if is_output else args[0]
                sample.setdefault(name, []).append(value.detach().flatten(0, 1).float().cpu())

            return hook

        for name, path, is_output in (
            ("attention_in", family.attention_in, False),
            ("query", family.query, True),
            ("key", family.key, True),
            ("attention_out", family.attention_out, False),
            ("mlp_in", family.mlp_in, False),
            ("mlp_out", family.mlp_out, False),
        ):
            handles.append(layer.get_submodule(path).register_forward_hook(keep(name, is_output=is_output)))
    student.set_gates(False)
    for batch in batches:
        student.hidden_states(batch)
    student.set_gates(True)
    for handle in handles:
        handle.remove()
    for layer, sample in zip(base.model.layers, store, strict=True):
        whole = {name: torch.cat(parts) for name, parts in sample.items()}
        down = layer.get_submodule(family.mlp_out).weight.float().cpu()
        output = layer.get_submodule(family.attention_out).weight.float().cpu()
        energy = (whole["attention_out"] * output.norm(dim=0)).square().unflatten(-1, (-1, shape.head_dim)).sum(-2)
        groups = shape.num_heads // shape.num_kv_heads
        query = whole["query"].reshape(-1, shape.num_kv_heads, groups, shape.head_dim).square().mean(0).sum(1)
        key = whole["key"].reshape(-1, shape.num_kv_heads, shape.head_dim).square().mean(0)
        yield {
            "attention_in": whole["attention_in"],
            "mlp_in": whole["mlp_in"],
            "neurons": whole["mlp_out"] * down.norm(dim=0),
            "query_key": (query * key).sum(0),
            "value": energy.mean(0),
            "value_energy": energy,
        }
        sample.clear()


def _cluster(features: Tensor, num_clusters: int) -> Tensor:
    """Spherical k-means on |features| with near-equal cluster sizes. [T, F] -> labels [T]."""
    points = F.normalize(features.abs().sqrt(), dim=-1)
    points = F.normalize(points - points.mean(dim=0), dim=-1)
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:num_clusters]]
    capacity = -(-len(points) // num_clusters) * 5 // 4
    labels = torch.zeros(len(points), dtype=torch.long)
    for _ in range(KMEANS_ITERATIONS):
        labels = _assign(points @ centres.T, capacity)
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, labels, points), dim=-1)
    return labels


def _assign(scores: Tensor, capacity: int) -> Tensor:
    """Best cluster of each token, full clusters passing their weakest tokens on. [T, N] -> [T]."""
    scores = scores.clone()
    labels = scores.argmax(dim=-1)
    for _ in range(scores.shape[-1]):
        for cluster in range(scores.shape[-1]):
            members = (labels == cluster).nonzero().squeeze(-1)
            if len(members) > capacity:
                weakest = members[scores[members, cluster].argsort()[: len(members) - capacity]]
                scores[weakest, cluster] = -torch.inf
                labels[weakest] = scores[weakest].argmax(dim=-1)
    return labels


def _fit_router(inputs: Tensor, labels: Tensor, num_experts: int) -> Tensor:
    """Softmax regression without bias from MLP inputs [T, D] to clusters: router weight [N, D]."""
    with torch.enable_grad():
        weight = torch.zeros(num_experts, inputs.shape[-1], requires_grad=True)
        optimiser = torch.optim.AdamW([weight], lr=0.02, weight_decay=0.05)
        for _ in range(ROUTER_ITERATIONS):
            loss = F.cross_entropy(inputs @ weight.T, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return weight.detach()


def _fit_value_router(
    head, inputs: Tensor, energy: Tensor, mean_logits: Tensor, keep_ratio: float, scale: float
) -> None:
    """Fit the value router to each token's own ranking of its V/O dims (mean squared error)."""
    target = 0.5 * _normal_logits(energy, keep_ratio, scale) + 0.5 * mean_logits
    with torch.enable_grad():
        parameters = [head.value_down.weight, head.value_up.weight, head.norm.weight, head.norm.bias]
        optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
        for step in range(ROUTER_ITERATIONS):
            rows = torch.arange(step % 4, len(inputs), 4)
            hidden = F.gelu(head.norm(head.value_down(inputs[rows])))
            loss = F.mse_loss(head.value_up(hidden), target[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for parameter in parameters:
        parameter.grad = None
