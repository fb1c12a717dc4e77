"""Warm start: experts from clusters of activations, within the budget."""

import pytest
import torch
from tomoe_training.method.student import Student
from tomoe_training.warm_start.initialization import _cluster, warm_start

from tests.helpers.dense_models import FAMILIES
from tests.helpers.students import random_student, settings


def _fresh(folder, **fields):
    base = random_student(folder).base.__class__.from_pretrained(folder).eval()
    torch.manual_seed(0)
    return Student(base, settings(**fields))


def _batches():
    return [torch.randint(3, 90, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(8)]


def _task_loss(student, batches):
    with torch.no_grad():
        student.calibrate(torch.cat(batches[:4]))
        student.update_widths()
        return student(torch.cat(batches[4:]))["task"].item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
def test_warm_start_beats_a_cold_one_before_any_step(family, vo_mode, dense_folder):
    cold, warm = (_fresh(dense_folder(family), vo_mode=vo_mode, active_ratio=0.7) for _ in range(2))
    warm_start(warm, _batches())
    assert _task_loss(warm, _batches()) < _task_loss(cold, _batches())


def test_initial_experts_differ_and_all_are_used(dense_folder):
    student = _fresh(dense_folder())
    warm_start(student, _batches())
    student(torch.cat(_batches()))
    for gate in student.expert_gates:
        assert len(torch.unique(gate.clean_masks, dim=0)) == 4
        assert gate.fractions.min().item() > 0.05


@pytest.mark.parametrize(("num_tokens", "num_clusters"), [(400, 4), (37, 8), (16, 1)])
def test_clusters_exceed_their_share_by_at_most_a_quarter(num_tokens, num_clusters):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(num_tokens, 20, generator=generator)
    features[: num_tokens * 9 // 10, 3] += 20  # nearly all tokens excite the same neuron
    sizes = _cluster(features, num_clusters, width=10).bincount(minlength=num_clusters)
    assert sizes.sum() == num_tokens
    assert sizes.max() <= -(-num_tokens // num_clusters) * 5 // 4


def test_warm_start_does_not_change_the_teacher(dense_folder):
    student = _fresh(dense_folder())
    before = {name: p.clone() for name, p in student.base.named_parameters()}
    warm_start(student, _batches())
    assert all(torch.equal(p, before[name]) for name, p in student.base.named_parameters())
