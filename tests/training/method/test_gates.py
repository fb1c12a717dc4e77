"""Gates for training: the masks of a step, and the quantiles of the value logits."""

import pytest
import torch
from tomoe_training.budget import NUM_QUANTILES, Widths
from tomoe_training.method.gates import (
    NOISE_FREE,
    LayerNoise,
    TrainedExpertGate,
    TrainedHeadGate,
    quantiles_per_sequence,
)

from tests.helpers.compare import assert_close
from tests.helpers.dense_models import dense_config
from tests.helpers.students import settings


def _head_gate(family="llama", **fields):
    torch.manual_seed(0)
    gate = TrainedHeadGate(dense_config(family), 0, settings(**fields))
    with torch.no_grad():
        gate.query_key_offset.normal_()
    return gate


def _expert_gate():
    torch.manual_seed(0)
    gate = TrainedExpertGate(dense_config("llama"), 0, settings())
    with torch.no_grad():
        gate.offset.normal_(-3.4)
    return gate


def _widths(qk=8, vo=6, experts=40):
    return Widths(experts=[experts], qk_dims=[qk], vo_dims=[vo], shift=0.0)


def test_quantiles_are_those_of_each_sequence():
    logits = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(0))
    quantiles = quantiles_per_sequence(logits)
    assert quantiles.shape == (NUM_QUANTILES,)
    values = logits.flatten().tolist()
    for i, quantile in enumerate(quantiles.tolist()):
        share_below = sum(value < quantile for value in values) / (len(values) - 1)
        assert share_below == pytest.approx(i / (NUM_QUANTILES - 1), abs=1.01 / len(values))


def test_quantiles_of_a_batch_are_the_mean_of_its_halves():
    logits = torch.randn(4, 20, 8)
    halves = torch.stack([quantiles_per_sequence(logits[:2]), quantiles_per_sequence(logits[2:])])
    assert_close(quantiles_per_sequence(logits), halves.mean(0))


def test_quantiles_of_a_single_token():
    assert torch.isfinite(quantiles_per_sequence(torch.randn(1, 1, 8))).all()


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("has_noise", [False, True])
def test_query_key_mask_of_fixed_width_consists_of_rope_pairs(family, has_noise):
    gate = _head_gate(family)
    embedding = torch.randn(4, 16)
    noise = LayerNoise(query_key=torch.randn(gate.shape.num_units)) if has_noise else NOISE_FREE
    gate.make_masks(embedding, noise, _widths(qk=8))
    mask, half = gate.query_key_mask().tolist(), gate.shape.rotary_dim // 2
    assert sum(mask) == 8
    assert gate.qk_width.item() == 8
    assert mask[:half] == mask[half : 2 * half]


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("widths", [None, _widths()])
def test_query_key_mask_gives_every_unit_a_gradient(family, widths):
    gate = _head_gate(family)
    gate.make_masks(torch.randn(4, 16), NOISE_FREE, widths)
    gate.query_key_mask().sum().backward()
    assert (gate.query_key_offset.grad > 0).all()


def test_value_mask_is_per_token_and_exactly_k_wide():
    gate = _head_gate()
    gate.make_masks(torch.randn(4, 16), NOISE_FREE, _widths(vo=6))
    mask = gate.value_mask(torch.randn(2, 5, 64))
    assert mask.shape == (2, 5, 16)
    assert (mask.sum(-1) == 6).all()
    assert gate.vo_width.item() == 6
    assert len(torch.unique(mask.flatten(0, 1), dim=0)) > 1


def test_static_value_mask_is_one_for_all_tokens():
    gate = _head_gate(vo_mode="static")
    gate.make_masks(torch.randn(4, 16), NOISE_FREE, _widths(vo=6))
    assert gate.value_mask(torch.randn(2, 5, 64)).shape == (16,)
    assert gate.value_mask(None).sum().item() == gate.vo_width.item() == 6


def test_no_value_pruning_keeps_every_dim():
    gate = _head_gate(vo_mode="none")
    gate.make_masks(torch.randn(4, 16), NOISE_FREE, _widths(vo=16))
    assert gate.value_mask(torch.randn(2, 5, 64)) is None
    assert gate.vo_width.item() == 16


def test_each_token_gets_the_mask_of_its_argmax_expert():
    gate = _expert_gate()
    gate.make_masks(torch.randn(4, 16), NOISE_FREE, None)
    hidden = torch.randn(2, 5, 64)
    mask = gate.neuron_mask(hidden)
    for b in range(2):
        for t in range(5):
            scores = [sum(w * x for w, x in zip(row, hidden[b, t].tolist(), strict=True)) for row in gate.router.weight]
            assert torch.equal(mask[b, t], gate.masks[scores.index(max(scores))])
    assert gate.fractions.sum().item() == pytest.approx(1)
    assert gate.probabilities.sum().item() == pytest.approx(1, abs=1e-6)


def test_every_expert_has_exactly_the_fixed_width():
    gate = _expert_gate()
    gate.make_masks(torch.randn(4, 16), NOISE_FREE, _widths(experts=40))
    assert gate.masks.sum(-1).tolist() == [40.0] * 4


def test_union_is_measured_without_noise():
    gate = _expert_gate()
    embedding = torch.randn(4, 16)
    gate.make_masks(embedding, NOISE_FREE, None)
    clean = gate.masks
    gate.make_masks(embedding, LayerNoise(experts=5 * torch.randn(4, 96)), None)
    assert not torch.equal(gate.masks, clean)
    assert torch.equal(gate.clean_masks, clean)


@pytest.mark.parametrize("router_noise", [None, torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(8))])
def test_step_masks_neurons_by_the_definition(router_noise):
    """``neuron_mask`` is the definition; what a step does in its place has its value and its gradients."""
    gate, hidden, neurons = _expert_gate(), torch.randn(2, 5, 64), torch.randn(2, 5, 96, requires_grad=True)
    embedding, trained = torch.randn(4, 16), [neurons, *gate.parameters()]
    results = []
    for is_step in (True, False):
        gate.make_masks(embedding, LayerNoise(router=router_noise), _widths(experts=40))
        if is_step:
            gate._read(None, (hidden,))
            (out,) = gate._mask_neurons(None, (neurons,))
        else:
            out = neurons * gate.neuron_mask(hidden)
        results.append((out, torch.autograd.grad(out.square().sum() + gate.probabilities.square().sum(), trained)))
    (out, gradients), (expected, plain) = results
    assert torch.equal(out, expected)
    for mine, theirs in zip(gradients, plain, strict=True):
        assert_close(mine, theirs)


def test_experts_that_keep_every_neuron_mask_nothing():
    gate, neurons = _expert_gate(), torch.randn(2, 5, 96)
    gate.make_masks(torch.randn(4, 16), NOISE_FREE, _widths(experts=96))
    gate._read(None, (torch.randn(2, 5, 64),))
    assert gate._mask_neurons(None, (neurons,)) is None
    assert gate.fractions.sum().item() == pytest.approx(1)


def test_union_is_measured_at_the_fixed_widths():
    gate = _expert_gate()
    gate.make_masks(torch.randn(4, 16), LayerNoise(experts=5 * torch.randn(4, 96)), _widths(experts=40))
    assert gate.clean_masks.sum(-1).tolist() == [40.0] * 4
    assert not torch.equal(gate.clean_masks, gate.masks)
