"""CMoE baseline: neurons clustered by their activations into shared and routed experts, without training.

Source: CMoE, Fast Carving of Mixture-of-Experts (Pei et al., arXiv 2502.04416), the training-free form.

Kept: A token activates the 10 neurons of largest |h|. The neurons activated most often form the shared
experts, which are always active. The other neurons are clustered into experts of equal size (balanced
k-means) by the tokens that activate them. The representative of an expert is the neuron closest to its
centroid. The router is analytic: an expert's score is |h| of its representative. Gate values are 1.

Simplified: The balanced assignment is stable (full clusters reject their worst neurons) instead of optimal
(Jonker-Volgenant). Half of the active experts are shared, as in the paper's S3A3E8. No fine-tuning, so no
learned gate scale and no balancing bias. Attention stays dense and counts against the budget. The router
(the representatives' weights) does not count, as for all routers here.
"""

import torch
from torch import Tensor, nn

from tomoe_training.budget import Widths
from tomoe_training.evaluation.baselines.setup import BaselineSetup, MethodGates
from tomoe_training.evaluation.baselines.widths import equal_experts, mlp_width
from tomoe_vllm.hf.configuration_tomoe import Family
from tomoe_vllm.hf.modeling_tomoe import ExpertGate

ACTIVATED_NEURONS = 10
"""Neurons that a token activates: the default of the authors' code."""
KMEANS_ITERATIONS = 15


class CMoEGate(ExpertGate):
    """Keeps the shared neurons and those of the routed experts whose representatives are most active.

    It reads the neurons (the input of the MLP's last linear), which include the representatives' activations.
    No family needs its own code.
    """

    def __init__(self, expert_of_neuron: Tensor, representatives: Tensor, num_active: int):
        """``expert_of_neuron``: [F] int64, -1 for shared; ``representatives``: [E] int64, neuron indices."""
        super().__init__()
        self.num_active = num_active
        self.register_buffer("expert_of_neuron", expert_of_neuron)
        self.register_buffer("representatives", representatives)

    def attach(self, layer: nn.Module, family: Family) -> None:
        layer.get_submodule(family.mlp_out).register_forward_pre_hook(self._route_and_mask)

    def _route_and_mask(self, module, args):
        self._read(module, args)
        return self._mask_neurons(module, args)

    def neuron_mask(self, neurons: Tensor) -> Tensor:
        """[T, F] bool for the neurons' activations [T, F]."""
        scores = neurons[..., self.representatives].abs()
        best = scores.topk(self.num_active, dim=-1).indices
        is_active = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return is_active[..., self.expert_of_neuron.clamp(min=0)] | (self.expert_of_neuron < 0)


def cmoe(setup: BaselineSetup) -> MethodGates:
    """CMoE with the number of equal experts closest to the budget; half of the active experts are shared."""
    shape, num_layers = setup.shape, len(setup.layers)
    num_neurons = shape.intermediate_size
    width = mlp_width(shape, setup.config.active_ratio, shape.head_dim, shape.head_dim)
    num_experts, num_active = equal_experts(num_neurons, width)
    num_activated = min(ACTIVATED_NEURONS, num_neurons)
    activated: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def record(layer: int, path: str, neurons: Tensor) -> None:
        activated[layer].append(neurons.abs().topk(num_activated, dim=-1).indices)

    tokens = setup.observe([setup.family.mlp_out], record)
    gates: list[ExpertGate] = []
    for parts in activated:
        chosen = torch.cat(parts).T
        markers = torch.zeros(num_neurons, tokens, device=chosen.device).scatter_(
            0, chosen, 1.0
        )  # [F, T]: 1 where the token activates the neuron
        gates.append(CMoEGate(*carve(markers, num_experts, num_active // 2), num_active - num_active // 2))
    widths = Widths(
        experts=[num_active * num_neurons // num_experts] * num_layers,
        qk_dims=[shape.head_dim] * num_layers,
        vo_dims=[shape.head_dim] * num_layers,
        shift=0.0,
    )
    note = f"{num_active} of {num_experts} experts, {num_active // 2} of them shared"
    return MethodGates(heads=[], experts=gates, widths=widths, tokens=tokens, note=note)


def carve(markers: Tensor, num_experts: int, num_shared: int) -> tuple[Tensor, Tensor]:
    """Experts from activation markers [F, T] of zeros and ones: (expert of each neuron, representatives).

    ``num_shared`` of ``num_experts`` are shared: their neurons are -1 in [F], the others 0 to E - 1 with
    E = num_experts - num_shared. Representatives: [E] neuron indices.
    """
    size = len(markers) // num_experts
    order = markers.sum(dim=1).argsort(descending=True, stable=True)
    routed = order[num_shared * size :]
    labels, centroids = _balanced_kmeans(markers[routed], num_experts - num_shared)
    expert_of_neuron = torch.full((len(markers),), -1, device=markers.device)
    expert_of_neuron[routed] = labels
    distances = _distances(markers[routed], centroids)
    outside = labels[:, None] != torch.arange(num_experts - num_shared, device=labels.device)
    return expert_of_neuron, routed[distances.masked_fill(outside, torch.inf).argmin(dim=0)]


def _balanced_kmeans(points: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Balanced k-means on points [n, T], initialized with the first points: labels [n], centroids [clusters, T]."""
    centroids, labels = points[:num_clusters], None
    for _ in range(KMEANS_ITERATIONS):
        new = balanced_assignment(-_distances(points, centroids))
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        centroids = torch.zeros_like(centroids).index_add_(0, labels, points) / (len(points) // num_clusters)
    assert labels is not None
    return labels, centroids


def _distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared Euclidean distances, [n, clusters]."""
    return points.square().sum(1, keepdim=True) - 2 * points @ centroids.T + centroids.square().sum(1)


def balanced_assignment(scores: Tensor) -> Tensor:
    """Assign points to clusters of equal size, preferring high scores: [n, clusters] -> [n].

    Deferred acceptance (Gale-Shapley): each full cluster rejects its worst points, which go to their next choice.
    The result is stable.
    """
    num_points, num_clusters = scores.shape
    capacity = num_points // num_clusters
    assert capacity * num_clusters == num_points
    preferences = scores.clone()
    labels = preferences.argmax(dim=-1)
    while True:
        over = (labels.bincount(minlength=num_clusters) > capacity).nonzero().flatten().tolist()
        if not over:
            return labels
        for cluster in over:
            members = (labels == cluster).nonzero().flatten()
            order = scores[members, cluster].argsort(descending=True, stable=True)
            rejected = members[order[capacity:]]
            preferences[rejected, cluster] = -torch.inf
            labels[rejected] = preferences[rejected].argmax(dim=-1)
