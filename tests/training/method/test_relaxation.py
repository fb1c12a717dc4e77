"""Straight-through relaxations: exact values, written-out gradients, and noise that is a pure function."""

import math

import numpy as np
import pytest
import torch
from tomoe_training.method.relaxation import (
    NoiseSource,
    gumbel,
    sample_mask,
    sample_route,
    straight_through,
    width_mask,
)

from tests.helpers.compare import assert_close, is_close
from tests.helpers.pretended_gpu import pretended_gpu, record_synchronizations

TAU = 0.4


def _sigmoid_slope(x: float) -> float:
    s = 1 / (1 + math.exp(-x))
    return s * (1 - s)


def test_straight_through_has_the_hard_value_and_the_soft_gradient():
    x = torch.randn(1000, requires_grad=True)
    out = straight_through(x > 0, x * 3 + 0.1)
    assert set(out.tolist()) == {0.0, 1.0}  # exact: no 0.99999994
    out.sum().backward()
    assert x.grad.tolist() == [3.0] * 1000


def test_gumbel_noise_has_the_mean_and_spread_of_its_distribution():
    noise = gumbel((400_000,), np.random.default_rng(0)).double()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=0.01)  # Euler's constant
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    assert torch.isfinite(noise).all()


def test_mask_at_the_threshold_is_kept_by_half_of_the_noise():
    # b = 3 and the Gumbel median 0.3665: a logit of -3.3665 is kept with probability 1/2.
    noise = gumbel((200_000,), np.random.default_rng(1))
    kept = sample_mask(torch.full((200_000,), -3.36651292), noise, TAU).mean().item()
    assert kept == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(200_000))


def test_mask_without_noise_is_the_majority_under_noise():
    logits = torch.linspace(-4.5, -2.5, 21).requires_grad_()
    noise = gumbel((20_000, 1), np.random.default_rng(2))
    share = sample_mask(logits, noise, TAU).mean(dim=0)
    mask = sample_mask(logits, None, TAU)
    clear = (share - 0.5).abs() > 0.02
    assert clear.sum() > 15
    assert torch.equal(mask[clear] > 0, share[clear] > 0.5)


def test_mask_gradient_is_the_slope_of_eq_15():
    logits = torch.tensor([-4.0, -3.3, 0.5], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.7, -0.2, 1.1], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    (sample_mask(logits, noise, TAU) * weights).sum().backward()
    expected = [
        w * _sigmoid_slope((x + g + 3.0) / TAU) / TAU
        for x, g, w in zip(logits.tolist(), noise.tolist(), weights.tolist(), strict=True)
    ]
    assert logits.grad.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [1, 7, 19, 20])
def test_width_mask_has_exactly_that_many_ones(width):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    for noise in (None, torch.randn(3, 20, generator=torch.Generator().manual_seed(4))):
        mask = width_mask(logits, width, noise, TAU)
        noisy = logits if noise is None else logits + noise
        for row, values in zip(mask.tolist(), noisy.tolist(), strict=True):
            assert sorted(row) == [0.0] * (20 - width) + [1.0] * width
            kept = [v for v, m in zip(values, row, strict=True) if m]
            dropped = [v for v, m in zip(values, row, strict=True) if not m]
            assert not dropped or min(kept) > max(dropped)


def test_width_mask_counts_exactly_with_ties():
    assert width_mask(torch.zeros(2, 9), 4, None, TAU).sum(-1).tolist() == [4.0, 4.0]


def test_dropped_entries_of_a_width_mask_get_a_gradient():
    logits = torch.tensor([0.0, 1.0, 2.0, 2.6], dtype=torch.float64, requires_grad=True)
    width_mask(logits, 2, None, TAU).sum().backward()
    expected = [_sigmoid_slope((x - 1.5) / TAU) / TAU for x in logits.tolist()]  # halfway between 1 and 2
    assert logits.grad.tolist() == pytest.approx(expected, rel=1e-9)
    assert all(g > 0 for g in logits.grad.tolist())


def test_width_mask_of_full_width_has_a_gradient_of_zero():
    logits = torch.tensor([0.0, 0.5, 0.9], requires_grad=True)
    width_mask(logits, 3, None, TAU).sum().backward()
    assert (logits.grad == 0).all()


def test_route_is_one_hot_with_the_gradient_of_the_tempered_softmax():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    noise = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    weights = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    experts, soft = sample_route(logits, noise, TAU)
    routes = straight_through(torch.nn.functional.one_hot(experts, 3), soft)
    for row, values in zip(routes.tolist(), (logits + noise).tolist(), strict=True):
        assert row == [1.0 if v == max(values) else 0.0 for v in values]
    (routes * weights).sum().backward()
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for t in range(4):
        exponentials = [math.exp((x + g) / TAU) for x, g in zip(logits[t].tolist(), noise[t].tolist(), strict=True)]
        p = [e / sum(exponentials) for e in exponentials]
        mean = sum(a * b for a, b in zip(p, weights[t].tolist(), strict=True))
        for n in range(3):
            expected[t, n] = p[n] * (weights[t, n] - mean) / TAU
    assert_close(logits.grad, expected)


def test_tolerance_catches_a_slope_at_the_wrong_temperature():
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(sample_mask(logits, None, tau).sum(), logits)[0] for tau in (0.4, 0.4001)]
    assert not is_close(*gradients)


def _source(seed=0, mask_scale=1.0, router_scale=1.0, device="cpu"):
    return NoiseSource(
        device=torch.device(device),
        seed=seed,
        num_layers=2,
        num_experts=3,
        num_neurons=5,
        num_units=4,
        head_dim=8,
        mask_scale=mask_scale,
        router_scale=router_scale,
    )


def test_noise_has_the_shapes_of_its_docstring():
    noise = _source().draw(0, [0, 1, 2], length=6)
    assert [tuple(part.shape) for part in (noise.experts, noise.query_key, noise.router, noise.value)] == [
        (2, 3, 5),
        (2, 4),
        (2, 3, 6, 3),
        (2, 3, 6, 8),
    ]


def test_noise_is_a_pure_function_of_seed_and_step():
    torch.manual_seed(123)
    once = _source().draw(7, [0, 1], 6)
    torch.manual_seed(456)
    again = _source().draw(7, [0, 1], 6)
    for name in ("experts", "query_key", "router", "value"):
        assert torch.equal(getattr(once, name), getattr(again, name))
        for other in (_source().draw(8, [0, 1], 6), _source(seed=1).draw(7, [0, 1], 6)):
            assert not torch.equal(getattr(once, name), getattr(other, name))


def test_noise_does_not_depend_on_how_sequences_are_split():
    together = _source().draw(3, [0, 1, 2, 3], 6)
    for ids in ([0], [2, 3], [3]):
        part = _source().draw(3, ids, 6)
        assert torch.equal(part.experts, together.experts)
        assert torch.equal(part.query_key, together.query_key)
        assert torch.equal(part.router, together.router[:, ids])
        assert torch.equal(part.value, together.value[:, ids])
    assert not torch.equal(together.router[:, 0], together.router[:, 1])


def test_noise_of_a_gpu_is_drawn_there_for_each_sequence_alone():
    with pretended_gpu() as device, record_synchronizations() as waits:
        together = _source(device=device).draw(3, [0, 1, 2, 3], 6)
        again, other = _source(device=device).draw(3, [0, 1, 2, 3], 6), _source(device=device).draw(4, [0, 1, 2, 3], 6)
        parts = {ids: _source(device=device).draw(3, list(ids), 6) for ids in ((0,), (2, 3))}
        assert len(waits) == 0, waits
        for name in ("experts", "query_key", "router", "value"):
            assert getattr(together, name).device == device
            assert torch.equal(getattr(together, name), getattr(again, name))
            assert not torch.equal(getattr(together, name), getattr(other, name))
        for ids, part in parts.items():
            assert torch.equal(part.experts, together.experts)
            assert torch.equal(part.router, together.router[:, list(ids)])
            assert torch.equal(part.value, together.value[:, list(ids)])
        assert not torch.equal(together.router[:, 0], together.router[:, 1])


def test_noise_of_a_gpu_has_the_mean_and_spread_of_its_distribution():
    noise = gumbel((400_000,), torch.Generator().manual_seed(0)).double()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    assert torch.isfinite(noise).all()


def test_noise_of_a_cpu_is_that_of_earlier_versions():
    """Numbers of commit e3b3fb0: a run that was started there is resumed with the same noise."""
    noise = _source(seed=5).draw(2, [7], 3)
    values = [noise.experts[1, 2, 3], noise.query_key[0, 1], noise.router[1, 0, 2, 0], noise.value[0, 0, 1, 5]]
    assert [value.item() for value in values] == pytest.approx([0.3781690, 0.0218059, 3.1370046, -0.6697653], abs=1e-6)


def test_scale_zero_is_no_noise_and_scale_two_is_twice_the_noise():
    none = _source(mask_scale=0.0, router_scale=0.0).draw(0, [0], 6)
    assert none.experts is none.query_key is none.router is none.value is None
    half = _source(mask_scale=0.0).draw(0, [0], 6)
    assert half.experts is None
    assert half.router is not None
    once, twice = _source().draw(0, [0], 6), _source(mask_scale=2.0, router_scale=2.0).draw(0, [0], 6)
    assert torch.equal(twice.experts, 2 * once.experts)
    assert torch.equal(twice.router, 2 * once.router)


@pytest.mark.parametrize("width", [None, 2, 4])
def test_mask_propagates_nan(width):
    logits = torch.tensor([1.0, float("nan"), -1.0, 2.0])
    mask = sample_mask(logits, None, TAU) if width is None else width_mask(logits, width, None, TAU)
    assert mask.isnan().any()
