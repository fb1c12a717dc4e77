"""Initial routers, masks and widths from the importance of units on a little training text.

A cold start collapses: experts that start equal stay copies of one static mask, because their noise satisfies
the union loss (docs/method.md). The warm start has four steps:

1. Compute the importance of every neuron for every token, in nats (importance.py).
2. Cluster the tokens of each MLP so that the best neurons of a cluster hold most of its importance, and fit the
   router to predict the cluster from the MLP's input (softmax regression).
3. Choose the widths of all layers: the budget goes to the units with the most importance per parameter (budget.py).
4. Set a unit's logit to a normal score of the rank of its importance for the expert's tokens. As many units as
   the layer's width are above the threshold.

The logits are stored in the gates' offsets, which are fixed or trained. The hypernetwork learns corrections.

All of it runs on the model's device, in the first process only: the others get its result, because a difference in the
last bit could give them other widths. Layers are recorded in groups of at most :data:`GROUP_BYTES`, one pass through
the model for each group. The device then holds, in bytes for T tokens of text and L layers,

    GROUP_BYTES + T (2 D + 4 A) L  (inputs and importance of the value routers, which need all widths)
    + 4 * 4 T F                    (float32 copies while one layer is clustered)

For LLaMA-2 7B and 8,192 tokens these are 4.3 + 2.3 + 1.4 GB and two passes. Host memory holds none of it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_training.budget import UnitImportance, allocate_widths
from tomoe_training.method.student import Student
from tomoe_training.warm_start.importance import LayerImportance, measure_importance
from tomoe_vllm.hf.tomoe_math import GUMBEL_MEDIAN, KEEP_BIAS, top_mask

GROUP_BYTES = 4 << 30
"""Size of the records that exist at once: a few passes for a 7B model, one for a small one."""
KMEANS_ITERATIONS = 15
REFINEMENTS = 6
"""Iterations that reassign tokens to the expert that keeps most of their importance."""
ROUTER_ITERATIONS = 150
ROUTER_TOKENS = 2048
"""Tokens per iteration of a router's fit: every token is used many times, and the fit takes seconds."""
LOGIT_SPREAD = 2.0
"""Standard deviation of the logits of a layer: 5 temperatures, so that few neurons are near the threshold."""
CLIP = 3.0
"""Upper bound of a token's weight, relative to the mean. Without it a few tokens determine an expert."""


@torch.no_grad()
def warm_start(student: Student, batches: list[Tensor]) -> None:
    """Set routers, offsets and, with the exact budget, widths from ``batches`` of [B, S] tokens, in this process.

    A run on several processes does this in the first one, and :meth:`Student.broadcast` copies the result. Where the
    processes share a sharded base, the others call :func:`assist_warm_start` meanwhile.
    """
    layers: list[_LayerStart] = []
    for group in _groups(student, batches):
        records = measure_importance(student, batches, layers=group)
        layers += [_start_experts(student, i, records.pop(0)) for i in group]  # frees a layer before the next
    _set_masks(student, layers)


def assist_warm_start(student: Student, batches: list[Tensor]) -> None:
    """The passes of :func:`warm_start` through the base, whose layers are gathered from all processes."""
    for _ in _groups(student, batches):
        measure_importance(student, batches, layers=range(0))


def _groups(student: Student, batches: list[Tensor]) -> list[range]:
    """Consecutive layers whose records for the experts take at most :data:`GROUP_BYTES`, at least one in each."""
    shape, num_layers = student.shape, len(student.expert_gates)
    num_tokens = sum(batch.numel() for batch in batches)
    layer_bytes = 2 * num_tokens * (shape.hidden_size + shape.intermediate_size)  # bfloat16
    size = max(1, GROUP_BYTES // layer_bytes)
    return [range(i, min(i + size, num_layers)) for i in range(0, num_layers, size)]


@dataclass(frozen=True, kw_only=True)
class _LayerStart:
    """What is kept of a layer until all widths are known."""

    experts: Tensor  # [N, F], importance of neurons for each expert
    query_key: Tensor  # [U]
    value: Tensor  # [T, A]
    attention_in: Tensor  # [T, D] bfloat16
    units: UnitImportance  # on the CPU: the widths are allocated there


def _start_experts(student: Student, i: int, layer: LayerImportance) -> _LayerStart:
    """Cluster the tokens of layer ``i`` and set its router."""
    shape, settings, gate = student.shape, student.settings, student.expert_gates[i]
    # Attention is more important per parameter, so that experts get less than p.
    expected = max(0.1, settings.active_ratio - 0.1)
    neurons = _clip(layer.neurons.float())
    labels = _cluster(neurons, settings.num_experts, round(expected * shape.intermediate_size))
    router = _fit_router(layer.mlp_in, labels, settings.num_experts)
    gate.router.weight.copy_(router)
    experts = _importance_of_experts(neurons, (layer.mlp_in.float() @ router.T).argmax(dim=-1), router)
    return _LayerStart(
        experts=experts,
        query_key=layer.query_key,
        value=layer.value,
        attention_in=layer.attention_in,
        units=_unit_importance(experts, layer),
    )


def _set_masks(student: Student, layers: list[_LayerStart]) -> None:
    """Allocate the widths; set the offsets of all masks, and fit the value routers."""
    shape, settings = student.shape, student.settings
    widths = allocate_widths(
        [layer.units for layer in layers],
        shape,
        settings.active_ratio,
        width_multiple=settings.width_multiple,
        head_dim_multiple=settings.head_dim_multiple,
        vo_mode=settings.vo_mode,
    )
    for i, layer in enumerate(layers):
        head, expert = student.head_gates[i], student.expert_gates[i]
        expert.offset.copy_(_normal_logits(layer.experts, widths.experts[i] / shape.intermediate_size))
        expert.up.weight.mul_(0.1)
        head.query_key_offset.copy_(_normal_logits(layer.query_key, widths.qk_dims[i] / shape.head_dim))
        head.query_key_up.weight.mul_(0.1)
        keep_ratio = widths.vo_dims[i] / shape.head_dim
        if settings.vo_mode == "static":
            head.value_offset.copy_(_normal_logits(layer.value.mean(dim=0), keep_ratio))
            head.value_up.weight.mul_(0.1)
        elif settings.vo_mode == "dynamic":
            _fit_value_router(head, layer.attention_in, layer.value, keep_ratio)
    if settings.budget == "exact":
        student.widths = widths


def _clip(importance: Tensor) -> Tensor:
    """Scale down the tokens that weigh more than :data:`CLIP` times the mean. [T, F] -> [T, F]."""
    weight = importance.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return importance * (CLIP * weight.mean() / weight).clamp(max=1)


def _normal_logits(importance: Tensor, keep_ratio: float) -> Tensor:
    """Normal scores of the ranks; the fraction ``keep_ratio`` is above the deterministic threshold."""
    size = importance.shape[-1]
    ranks = importance.argsort(dim=-1).argsort(dim=-1).float()
    scores = torch.special.ndtri((ranks + 0.5) / size)
    keep_ratio = min(keep_ratio, 1 - 0.25 / size)  # keeps the logits finite if all are kept
    cut = torch.special.ndtri(torch.tensor(1 - keep_ratio))
    return LOGIT_SPREAD * (scores - cut) - (KEEP_BIAS + GUMBEL_MEDIAN)


def _importance_of_experts(neurons: Tensor, labels: Tensor, router: Tensor) -> Tensor:
    """Importance of neurons summed over the tokens of each expert, divided by the number of all tokens: [N, F].

    The fitted router assigns the tokens. An expert without tokens gets the layer's mean.
    """
    sums = neurons.new_zeros(len(router), neurons.shape[-1]).index_add_(0, labels, neurons)
    is_idle = labels.bincount(minlength=len(router)) == 0
    sums[is_idle] = neurons.mean(dim=0)
    return sums / len(neurons)


def _unit_importance(experts: Tensor, layer: LayerImportance) -> UnitImportance:
    """Importance of the layer's first, second, ... neuron and V/O dim, and of its Q/K units, on the CPU.

    For V/O dims it is the mean of two bounds: the best dims of each token (an oracle router) and the best static
    dims.
    """
    oracle = layer.value.sort(dim=-1, descending=True).values.mean(dim=0)
    static = layer.value.mean(dim=0).sort(descending=True).values
    return UnitImportance(
        neurons=experts.sort(dim=-1, descending=True).values.sum(dim=0).cpu(),
        query_key=layer.query_key.cpu(),
        value=((oracle + static) / 2).cpu(),
    )


def _cluster(neurons: Tensor, num_clusters: int, width: int) -> Tensor:
    """Cluster tokens into clusters of nearly equal size: importance [T, F] -> labels [T].

    Spherical k-means first. Then each token is assigned to the cluster whose ``width`` best neurons hold most of its
    importance (Lloyd's iteration on the importance that a mask retains). A token's weight is the square root of its
    importance.
    """
    capacity = -(-len(neurons) // num_clusters) * 5 // 4
    points = F.normalize(neurons.sqrt().sqrt(), dim=-1)
    points = F.normalize(points - points.mean(dim=0), dim=-1)
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:num_clusters]
    centres = points[chosen.to(points.device)]
    labels = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for _ in range(KMEANS_ITERATIONS):
        labels = _assign(points @ centres.T, capacity)
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, labels, points), dim=-1)
    weighted = neurons / neurons.sum(dim=-1, keepdim=True).clamp(min=1e-20).sqrt()
    for _ in range(REFINEMENTS):
        sums = torch.zeros_like(centres).index_add_(0, labels, weighted)
        labels = _assign(weighted @ top_mask(sums, width).float().T, capacity)
    return labels


def _assign(scores: Tensor, capacity: int) -> Tensor:
    """Best cluster of each token; full clusters reject their weakest tokens. [T, N] -> [T]."""
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
        weight = torch.zeros(num_experts, inputs.shape[-1], device=inputs.device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=0.02, weight_decay=0.05)
        for step in range(ROUTER_ITERATIONS):
            rows = _rows(len(inputs), step, inputs.device)
            loss = F.cross_entropy(inputs[rows].float() @ weight.T, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight.detach()


def _rows(num_tokens: int, step: int, device: torch.device) -> Tensor:
    """Indices of every n-th token with an offset of ``step``, about :data:`ROUTER_TOKENS`."""
    stride = max(1, num_tokens // ROUTER_TOKENS)
    return torch.arange(step % stride, num_tokens, stride, device=device)


def _fit_value_router(head, inputs: Tensor, importance: Tensor, keep_ratio: float) -> None:
    """Fit the value router to the mean of each token's own ranking of V/O dims and the average ranking."""
    mean_logits = _normal_logits(importance.mean(dim=0), keep_ratio)
    target = 0.5 * _normal_logits(importance, keep_ratio) + 0.5 * mean_logits
    with torch.enable_grad():
        parameters = [head.value_down.weight, head.value_up.weight, head.norm.weight, head.norm.bias]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
        for step in range(ROUTER_ITERATIONS):
            rows = _rows(len(inputs), step, inputs.device)
            hidden = F.gelu(head.norm(head.value_down(inputs[rows].float())))
            loss = F.mse_loss(head.value_up(hidden), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter in parameters:
        parameter.grad = None
