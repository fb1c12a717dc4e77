"""CMoE: carving, routing and the balanced assignment against cases written out by hand."""

import pytest
import torch
from tomoe_training.evaluation.baselines.cmoe import CMoEGate, balanced_assignment, carve, cmoe

MARKERS = torch.tensor(
    [
        # tokens 0 1 2 3 4 5
        [1, 1, 1, 1, 1, 1],  # 0: always active
        [1, 1, 0, 0, 0, 0],  # 1: with 4
        [0, 0, 1, 1, 0, 0],  # 2: with 6
        [0, 0, 0, 0, 1, 1],  # 3: with 7
        [1, 0, 0, 0, 0, 0],  # 4
        [1, 1, 1, 1, 1, 0],  # 5: nearly always active
        [0, 0, 1, 0, 0, 0],  # 6
        [0, 0, 0, 0, 0, 1],  # 7
    ]
).float()


def test_cmoe_shares_the_most_active_and_clusters_the_rest():
    experts, representatives = carve(MARKERS, num_experts=4, num_shared=1)
    assert experts.tolist() == [-1, 0, 1, 2, 0, -1, 1, 2]
    # Both neurons of a pair are equally far from their centroid: the first in order of activity.
    assert representatives.tolist() == [1, 2, 3]


def test_cmoe_representative_is_closest_to_the_centroid():
    # Experts of 3: neurons 0 to 2 agree but for 0, neurons 3 to 5 but for 5.
    markers = torch.tensor(
        [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0],
         [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    ).float()  # fmt: skip
    experts, representatives = carve(markers, num_experts=2, num_shared=0)
    assert experts[:3].unique().numel() == experts[3:].unique().numel() == 1
    assert experts[0] != experts[5]
    assert sorted(representatives.tolist())[0] in (1, 2)
    assert sorted(representatives.tolist())[1] in (3, 4)


def test_cmoe_routes_by_the_representatives_activation():
    gate = CMoEGate(torch.tensor([-1, 0, 1, 2, 0, -1, 1, 2]), torch.tensor([1, 2, 3]), 1)
    neurons = torch.tensor([[9.0, 0.1, -3.0, 2.0, 9.0, 9.0, 9.0, 9.0], [0.0, 0.3, 0.1, 0.2, 0.0, 0.0, 0.0, 0.0]])
    expected = [[1, 0, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0, 0]]  # experts 1 and 0, and the shared ones
    assert gate.neuron_mask(neurons).int().tolist() == expected


def test_cmoe_experts_of_a_model_are_equal_and_half_of_the_active_are_shared(make_setup):
    gates = cmoe(make_setup(active_ratio=0.6))  # 12 experts of 8 neurons, 4 active
    for gate in gates.experts:
        assert gate.expert_of_neuron.add(1).bincount().tolist() == [16] + [8] * 10
        assert gate.num_active == 2
        assert gate.expert_of_neuron[gate.representatives].tolist() == list(range(10))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[9, 1], [8, 2], [3, 7], [1, 6]], [0, 0, 1, 1]),  # no rejection
        ([[9, 8], [8, 1], [7, 6], [6, 5]], [0, 0, 1, 1]),  # all want cluster 0: the best two have it
        ([[5, 0], [9, 0], [8, 0], [7, 0]], [1, 0, 0, 1]),
    ],
)
def test_full_clusters_keep_their_best(scores, expected):
    assert balanced_assignment(torch.tensor(scores).float()).tolist() == expected


def test_balanced_assignment_is_stable():
    scores = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    labels = balanced_assignment(scores)
    assert labels.bincount().tolist() == [10] * 6
    for point, label in enumerate(labels.tolist()):
        for cluster in range(6):
            if scores[point, cluster] > scores[point, label]:  # it would rather go there: they are all better
                assert (scores[labels == cluster, cluster] >= scores[point, cluster]).all()
