"""Warm start: experts from clusters of activations, within the budget."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tomoe_training.method.student import Student
from tomoe_training.warm_start import initialization
from tomoe_training.warm_start.importance import LayerImportance
from tomoe_training.warm_start.initialization import (
    _cluster,
    _fit_router,
    _fit_value_router,
    assist_warm_start,
    warm_start,
)

from tests.helpers.dense_models import FAMILIES
from tests.helpers.pretended_gpu import pretended_gpu
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


def _started(folder, **fields):
    student = _fresh(folder, **fields)
    warm_start(student, _batches())
    return student


@pytest.mark.parametrize("vo_mode", ["dynamic", "static"])
def test_layers_may_be_recorded_in_groups(vo_mode, dense_folder, monkeypatch):
    whole = _started(dense_folder(), vo_mode=vo_mode)
    monkeypatch.setattr(initialization, "GROUP_BYTES", 1)
    groups = []
    measure = initialization.measure_importance

    def counted(student, batches, layers):
        groups.append(list(layers))
        return measure(student, batches, layers=layers)

    monkeypatch.setattr(initialization, "measure_importance", counted)
    parts = _started(dense_folder(), vo_mode=vo_mode)
    assert groups == [[0], [1]]  # one layer's records at a time
    assert parts.widths == whole.widths
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor), name
    groups.clear()
    assist_warm_start(parts, _batches())  # as many passes, so that the processes stay in step
    assert groups == [[], []]


def test_groups_of_a_7b_model_hold_at_most_four_gibibytes(dense_folder):
    """T = 8,192 tokens, D = 4,096, F = 11,008 in 32 layers: 7.9 GB of records for the experts, in two groups."""
    shape = dataclasses.replace(_fresh(dense_folder()).shape, hidden_size=4096, intermediate_size=11008)
    student = SimpleNamespace(shape=shape, expert_gates=[None] * 32)
    batches = [torch.zeros(4, 2048, dtype=torch.long, device="meta")]
    sizes = [len(group) for group in initialization._groups(student, batches)]
    assert sizes == [17, 15]
    assert max(sizes) * 2 * 8192 * (4096 + 11008) <= 4 * 2**30


def test_routers_are_fitted_on_the_device_of_the_gates(dense_folder, monkeypatch):
    """On "meta", which stands for "cuda": a CPU tensor beside it raises."""
    monkeypatch.setattr(initialization, "ROUTER_ITERATIONS", 2)
    head = _fresh(dense_folder()).head_gates[0].to("meta")
    inputs = torch.empty(256, 64, dtype=torch.bfloat16, device="meta")
    _fit_value_router(head, inputs, torch.empty(256, 16, device="meta"), keep_ratio=0.5)
    labels = torch.empty(256, dtype=torch.long, device="meta")
    assert _fit_router(inputs, labels, num_experts=4).device.type == "meta"


def test_clustering_a_layer_takes_four_float32_copies_of_its_records(monkeypatch):
    """The bytes that the module's docstring names; without the workspaces of kernels."""
    for name in ("ROUTER_ITERATIONS", "KMEANS_ITERATIONS", "REFINEMENTS"):
        monkeypatch.setattr(initialization, name, 2)
    num_tokens, hidden_size, num_neurons = 512, 64, 2048
    shapes = {"attention_in": hidden_size, "mlp_in": hidden_size, "neurons": num_neurons, "value": 16}
    with pretended_gpu() as device, torch.no_grad():
        records = {name: torch.rand(num_tokens, size).to(device, torch.bfloat16) for name, size in shapes.items()}
        layer = LayerImportance(query_key=torch.rand(8).to(device), **records)
        student = SimpleNamespace(
            shape=SimpleNamespace(intermediate_size=num_neurons),
            settings=settings(num_experts=8),
            expert_gates=[SimpleNamespace(router=torch.nn.Linear(hidden_size, 8, bias=False).to(device))],
        )
        before = torch.gpu.memory_allocated()
        torch.gpu.reset_peak_memory_stats()
        initialization._start_experts(student, 0, layer)
        peak = torch.gpu.max_memory_allocated() - before
    assert peak <= 4.1 * 4 * num_tokens * num_neurons
