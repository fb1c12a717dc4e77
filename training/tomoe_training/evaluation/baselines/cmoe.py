"""Rival: neurons clustered by their activations into shared and routed experts, without any training.

Stands for: CMoE, Fast Carving of Mixture-of-Experts (Pei et al., arXiv 2502.04416), its training-free form.
Kept: a token activates the 10 neurons of largest |h|; the neurons most often activated are the shared
experts, always on; the rest are clustered by which tokens activate them, into equal experts (balanced
k-means); an expert's representative is the neuron nearest to its centroid; the router is analytic, an
expert's score being |h| of its representative, and the best are chosen. Gate values are 1.
Simplified: the balanced assignment is a stable one (full clusters pass their worst neurons on) instead of
the optimal one (Jonker-Volgenant); shared and routed experts share the active ones half and half, as in the
paper's S3A3E8; no fine-tuning, so no learned gate scale and no balancing bias. Attention stays dense and is
paid for. The router (representatives' weights) is outside the budget, like all routers here.
"""

import torch
from torch import Tensor, nn

from tomoe_training.budget import Widths
from tomoe_training.evaluation.baselines.setup import Contest, MethodGates
from tomoe_training.evaluation.baselines.widths import equal_experts, mlp_width
from tomoe_vllm.hf.configuration_tomoe import Family
from tomoe_vllm.hf.modeling_tomoe import ExpertGate

ACTIVATED_NEURONS = 10
"""Neurons a token activates: the default of the authors' code."""
KMEANS_ITERATIONS = 15


class CMoEGate(ExpertGate):
    """Shared neurons, and the routed experts whose representatives are most active.

    It reads the neurons themselves (the input of the MLP's last linear): the representatives' activations
    are there already, so no family needs code of its own.
    """

    def __init__(self, expert_of_neuron: Tensor, representatives: Tensor, num_active: int):
        """``expert_of_neuron``: [F] int64, -1 for shared; ``representatives``: [E] int64, a neuron each."""
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


def cmoe(contest: Contest) -> MethodGates:
    """CMoE within the budget: as many equal experts, half of the active ones shared, as come nearest to it."""
    shape, num_layers = contest.shape, len(contest.layers)
    num_neurons = shape.intermediate_size
    width = mlp_width(shape, contest.config.active_ratio, shape.head_dim, shape.head_dim)
    num_experts, num_active = equal_experts(num_neurons, width)
    num_activated = min(ACTIVATED_NEURONS, num_neurons)
    activated: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def see(layer: int, path: str, neurons: Tensor) -> None:
        activated[layer].append(neurons.abs().topk(num_activated, dim=-1).indices.cpu())

    tokens = contest.observe([contest.family.mlp_out], see)
    gates: list[ExpertGate] = []
    for parts in activated:
        markers = torch.zeros(num_neurons, tokens)
        markers.scatter_(0, torch.cat(parts).T, 1.0)  # [F, T]: 1 where the token activates the neuron
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
    E = num_experts - num_shared. Representatives: [E], a neuron each.
    """
    size = len(markers) // num_experts
    order = markers.sum(dim=1).argsort(descending=True, stable=True)
    routed = order[num_shared * size :]
    labels, centroids = _balanced_kmeans(markers[routed], num_experts - num_shared)
    expert_of_neuron = torch.full((len(markers),), -1)
    expert_of_neuron[routed] = labels
    distances = _distances(markers[routed], centroids)
    outside = labels[:, None] != torch.arange(num_experts - num_shared)
    return expert_of_neuron, routed[distances.masked_fill(outside, torch.inf).argmin(dim=0)]


def _balanced_kmeans(points: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Equal clusters of points [n, T], started from the first ones: (labels [n], centroids [clusters, T])."""
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
    """Every point to a cluster, all equally large, high scores first: [n, clusters] -> [n].

    Deferred acceptance: a point goes to its best cluster that does not prefer others; the result is stable.
    """
    num_points, num_clusters = scores.shape
    capacity = num_points // num_clusters
    assert capacity * num_clusters == num_points
    wishes = scores.clone()
    labels = wishes.argmax(dim=-1)
    while True:
        over = (labels.bincount(minlength=num_clusters) > capacity).nonzero().flatten().tolist()
        if not over:
            return labels
        for cluster in over:
            members = (labels == cluster).nonzero().flatten()
            order = scores[members, cluster].argsort(descending=True, stable=True)
            refused = members[order[capacity:]]
            wishes[refused, cluster] = -torch.inf
            labels[refused] = wishes[refused].argmax(dim=-1)
