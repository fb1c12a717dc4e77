"""Teacher and student in one frozen model."""

import pytest
import torch
from tomoe_training.budget import Widths
from tomoe_training.method.relaxation import NoiseSource

from tests.helpers.compare import assert_close
from tests.helpers.dense_models import FAMILIES, dense_model
from tests.helpers.students import gated_logits, random_student


def _ids(batch=2, length=16):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gates_off_is_bit_identical_to_the_teacher(family, dense_folder):
    student = random_student(dense_folder(family))
    student.set_gates(False)
    assert torch.equal(student.base(_ids()).logits, dense_model(family)(_ids()).logits)


def test_only_the_gates_are_trained_and_saved(dense_folder):
    student = random_student(dense_folder())
    assert not any(p.requires_grad for p in student.base.parameters())
    assert not any(name.startswith("base") for name in student.state_dict())
    student(_ids())["loss"].backward()
    assert all(p.grad is None for p in student.base.parameters())


# Fixed widths: those computed from the logits of a random student would depend on rounding.
_RAGGED = {"experts": [40, 64], "qk_dims": [12, 4]}


def _without_gradient(student):
    student(_ids())["loss"].backward()
    return {n for n, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}


@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
@pytest.mark.parametrize("budget", ["exact", "penalty"])
def test_every_trained_tensor_gets_a_gradient(vo_mode, budget, dense_folder):
    student = random_student(dense_folder(), vo_mode=vo_mode, budget=budget)
    if budget == "exact":
        student.widths = Widths(**_RAGGED, vo_dims=[16, 16] if vo_mode == "none" else [8, 12], shift=0.0)
    assert _without_gradient(student) == set()


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(
    ("vo_mode", "qk_dims", "vo_dims", "idle"),
    [
        ("dynamic", [16, 4], [8, 12], {"0.query_key_up.weight", "0.query_key_offset"}),
        ("dynamic", [8, 4], [8, 16], {"1.value_up.weight", "1.value_down.weight"}),
        ("static", [8, 4], [8, 16], {"1.value_up.weight", "1.value_offset"}),
        (
            "dynamic",
            [16, 4],
            [16, 12],
            {f"0.{n}" for n in ("query_key_up.weight", "query_key_offset", "value_up.weight", "value_down.weight")}
            | {"0.norm.weight", "0.norm.bias", "0.embedding_offset"},
        ),
    ],
)
def test_only_parameters_of_unpruned_dims_are_frozen(is_frozen, vo_mode, qk_dims, vo_dims, idle, dense_folder):
    """With nothing to choose there is no gradient; once the widths stay, it is not asked for any more."""
    student = random_student(dense_folder(), vo_mode=vo_mode)
    student.widths = Widths(experts=[40, 64], qk_dims=qk_dims, vo_dims=vo_dims, shift=0.0)
    if is_frozen:
        student.freeze_widths()
    expected = {f"head_gates.{name}" for name in idle}
    assert _without_gradient(student) == (set() if is_frozen else expected)
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == (expected if is_frozen else set())


def test_untrained_offsets_stay_constant(dense_folder):
    student = random_student(dense_folder(), train_offsets=False)
    held = {n for n, p in student.named_parameters() if not p.requires_grad}
    assert held == {n for n, _ in student.named_parameters() if n.endswith("offset")}


def test_loss_is_the_weighted_sum_of_its_terms(dense_folder):
    student = random_student(dense_folder(), alpha=7.0, beta=3.0, gamma=2.0, budget="penalty")
    out = {name: value.item() for name, value in student(_ids()).items()}
    assert out["loss"] == pytest.approx(out["task"] + 7 * out["r_p"] + 3 * out["r_u"] + 2 * out["r_l"], rel=1e-5)


def test_exact_budget_has_no_parameter_penalty(dense_folder):
    student = random_student(dense_folder(), alpha=7.0, beta=3.0, gamma=2.0)
    student.update_widths()
    out = {name: value.item() for name, value in student(_ids()).items()}
    assert out["loss"] == pytest.approx(out["task"] + 3 * out["r_u"] + 2 * out["r_l"], rel=1e-5)
    assert out["active_ratio"] == pytest.approx(student.widths.active_ratio(student.shape), rel=1e-6)
    assert out["active_ratio"] <= 0.6


def test_distillation_loss_is_zero_if_everything_is_kept(dense_folder):
    student = random_student(dense_folder(), active_ratio=1.0)
    student.update_widths()
    assert student(_ids())["task"].item() == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_language_model_objective_is_the_cross_entropy_of_next_tokens(dense_folder):
    student = random_student(dense_folder(), objective="lm")
    logits = gated_logits(student, _ids())
    log_p = logits.double().log_softmax(-1)
    nll = [-log_p[b, t, _ids()[b, t + 1]].item() for b in range(2) for t in range(15)]
    assert student(_ids())["task"].item() == pytest.approx(sum(nll) / 30, rel=1e-5)


@torch.no_grad()
def test_masks_with_noise_differ_and_without_are_repeatable(dense_folder):
    student = random_student(dense_folder(), mask_noise=1.0, router_noise=1.0, budget="penalty")
    noise = NoiseSource.of(student, seed=0)
    losses = [student(_ids(), noise.draw(step, [0, 1], 16))["task"].item() for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
def test_student_started_from_an_adapter_has_its_masks(family, vo_mode, dense_folder):
    trained = random_student(dense_folder(family), vo_mode=vo_mode)
    fresh = random_student(dense_folder(family), vo_mode=vo_mode, seed=5)
    ids = _ids()
    expected = gated_logits(trained, ids)
    fresh.load_layer_adapters(trained.layer_adapters())
    assert_close(gated_logits(fresh, ids), expected, limit=1e-4)  # offsets absorb float32 rounding
    assert fresh.widths.experts == trained.widths.experts
    assert fresh.widths.qk_dims == trained.widths.qk_dims


@torch.no_grad()
def test_running_quantiles_move_slowly_and_once_per_step(dense_folder):
    student = random_student(dense_folder())
    before = student.value_quantiles.clone()
    seen = []
    for part in _ids(batch=3).split(1):
        student(part)
        seen.append(torch.stack([head.batch_quantiles for head in student.head_gates]))
    assert torch.equal(student.value_quantiles, before)
    student.update_quantiles()
    assert_close(student.value_quantiles, 0.98 * before + 0.02 * torch.stack(seen).mean(dim=0))
    once = student.value_quantiles.clone()
    student.update_quantiles()  # nothing new was seen
    assert torch.equal(student.value_quantiles, once)
