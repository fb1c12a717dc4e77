"""Neurons split at random into experts: weights, gradients, training and resuming of the routers."""

import contextlib
import dataclasses
import math

import pytest
import torch
from tomoe_training.evaluation.baselines.random_experts import (
    RandomExpertGate,
    random_experts,
    split_at_random,
    train_routers,
)
from tomoe_training.method.losses import distillation_loss

from tests.helpers.compare import assert_close


def _random_gate(top_k=2):
    """4 experts of 2 neurons on 4 hidden dims, whose router passes the hidden state on as logits."""
    gate = RandomExpertGate(4, torch.tensor([3, 0, 1, 2, 0, 1, 2, 3]), 4, top_k)
    with torch.no_grad():
        gate.router.weight.copy_(torch.eye(4))
    return gate


def test_neurons_of_the_top_k_experts_are_weighted():
    hidden = torch.tensor([[0.0, 2.0, 1.0, -1.0], [5.0, 0.0, 0.0, 5.0]])
    high, low = (2 * math.exp(v) / (math.exp(2) + math.exp(1)) for v in (2, 1))
    expected = [[0, 0, high, low, 0, high, low, 0], [1, 1, 0, 0, 1, 0, 0, 1]]
    assert_close(_random_gate().neuron_mask(hidden), torch.tensor(expected))


def test_gradient_does_not_change_the_weights_and_reaches_every_expert():
    hidden = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    for top_k in (1, 2):
        gate = _random_gate(top_k)
        with torch.no_grad():
            expected = gate.neuron_mask(hidden)
        mask = gate.neuron_mask(hidden)
        assert torch.equal(mask, expected)
        (mask * torch.arange(8.0)).sum().backward()
        assert (gate.router.weight.grad.abs().sum(dim=1) > 0).all()


def test_router_gradient_at_k_1_comes_from_unselected_experts():
    gate, logits = _random_gate(top_k=1), [0.0, 2.0, 1.0, -1.0]
    (gate.neuron_mask(torch.tensor([logits])) * torch.arange(8.0)).sum().backward()
    values = [1 + 4, 2 + 5, 3 + 6, 0 + 7]  # of the experts' neurons under this loss; expert 1 is chosen
    soft = [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
    others = sum(s * v for i, (s, v) in enumerate(zip(soft, values, strict=True)) if i != 1)
    expected = [s * ((v if i != 1 else 0) - others) for i, (s, v) in enumerate(zip(soft, values, strict=True))]
    assert_close(gate.router.weight.grad, torch.outer(torch.tensor(expected), torch.tensor(logits)) + 0.0)


def test_random_experts_are_disjoint_equal_and_random(make_setup):
    setup = make_setup(active_ratio=0.6)
    splits = [gate.expert_of_neuron for gate in split_at_random(setup).experts]
    again = [gate.expert_of_neuron for gate in split_at_random(setup).experts]
    for split, same in zip(splits, again, strict=True):
        assert torch.equal(split, same)
        assert split.bincount().tolist() == [8] * 12  # 96 neurons, each in one expert
        assert not torch.equal(split, split.sort().values)
    assert not torch.equal(splits[0], splits[1])


@torch.no_grad()
def _distillation(setup, gates) -> float:
    ids = torch.stack([setup.blocks.block(i) for i in range(150, 180)])  # past what few steps train on
    gates.set_on(False)
    teacher = setup.base.model(ids).last_hidden_state.flatten(0, 1)
    gates.set_on(True)
    student = setup.base.model(ids).last_hidden_state.flatten(0, 1)
    return distillation_loss(student, teacher, setup.base.lm_head).item()


def test_trained_router_beats_an_untrained_one(make_setup):
    setup = make_setup(active_ratio=0.6, steps=60, learning_rate=1e-2, gamma=0.1)
    untrained = split_at_random(setup)
    untrained.attach(setup.base)
    before = _distillation(setup, untrained)
    untrained.set_on(False)
    trained = random_experts(setup)
    trained.attach(setup.base)
    assert trained.tokens == 60 * 2 * 32
    assert _distillation(setup, trained) < 0.9 * before


def test_micro_batches_do_not_change_the_trained_router(make_setup, tmp_path):
    whole, halves = (split_at_random(make_setup()) for _ in range(2))
    train_routers(make_setup(gamma=0.0), whole)
    train_routers(dataclasses.replace(make_setup(gamma=0.0, micro_batch_size=1), work=tmp_path / "halves"), halves)
    for one, other in zip(whole.experts, halves.experts, strict=True):
        assert_close(one.router.weight.detach(), other.router.weight.detach(), 1e-4)


def test_training_does_not_change_the_dense_weights(make_setup, dense_folder):
    setup = make_setup()
    before = {name: p.clone() for name, p in setup.base.named_parameters()}
    random_experts(setup)
    assert all(torch.equal(p, before[name]) for name, p in setup.base.named_parameters())


@pytest.mark.parametrize("steps_before_the_kill", [3, 7])
def test_killed_training_of_routers_ends_with_the_same_bits(steps_before_the_kill, make_setup, tmp_path):
    fields = {"active_ratio": 0.6, "steps": 7, "checkpoint_every": 3, "schedule": "linear"}
    whole = random_experts(dataclasses.replace(make_setup(**fields), work=tmp_path / "whole"))
    setup = dataclasses.replace(make_setup(**fields), work=tmp_path / "killed")
    blocks, asked = setup.blocks.batch, []

    def stop(step, *args):
        if step > steps_before_the_kill:
            raise KeyboardInterrupt
        return blocks(step, *args)

    setup.blocks.batch = stop
    with contextlib.suppress(KeyboardInterrupt):
        random_experts(setup)
    setup.blocks.batch = lambda step, *args: asked.append(step) or blocks(step, *args)
    resumed = random_experts(setup)
    assert asked == list(range(3, 7)) if steps_before_the_kill == 3 else asked == []
    for mine, theirs in zip(resumed.experts, whole.experts, strict=True):
        assert torch.equal(mine.router.weight, theirs.router.weight)


def test_routers_of_other_settings_are_refused_and_kept(make_setup):
    random_experts(make_setup(active_ratio=0.6, steps=2))
    file = make_setup().work / "random_experts" / "routers.pt"
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"routers\.pt was written for other settings; choose another --work"):
        random_experts(make_setup(active_ratio=0.6, steps=3))
    assert file.read_bytes() == before
    file.write_bytes(before[:100])
    with pytest.raises(ValueError, match=r"routers\.pt is damaged \(.*\); remove it"):
        random_experts(make_setup(active_ratio=0.6, steps=2))
