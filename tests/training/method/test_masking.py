"""Masking by expert against its definition, with gradients."""

import pytest
import torch
from tomoe_training.method.masking import mask_by_expert
from tomoe_training.method.relaxation import straight_through

from tests.helpers.compare import assert_close, is_close


def _inputs(num_tokens=(2, 7), num_experts=3, num_neurons=10, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    soft = randn(*num_tokens, num_experts).softmax(dim=-1)
    masks = (randn(num_experts, num_neurons) > 0).float()
    return {
        "neurons": randn(*num_tokens, num_neurons).to(dtype).requires_grad_(),
        "soft_routes": soft.requires_grad_(),
        "masks": masks.requires_grad_(),
        "experts": soft.argmax(dim=-1),
    }


def _plain(neurons, soft_routes, masks, experts):
    one_hot = torch.nn.functional.one_hot(experts, len(masks))
    return neurons * (straight_through(one_hot, soft_routes) @ masks).to(neurons.dtype)


def _value_and_gradients(function, inputs):
    weight = torch.randn(inputs["neurons"].shape, generator=torch.Generator().manual_seed(9))
    out = function(**inputs)
    trained = [t for t in inputs.values() if t.requires_grad]
    return out, torch.autograd.grad((out.float() * weight).sum(), trained)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_tokens": (1,)},  # one token, one dimension
        {"num_experts": 1},
        {"num_experts": 9, "num_tokens": (2, 2)},  # experts without a token
        {"num_neurons": 1},
    ],
    ids=str,
)
def test_value_and_gradients_equal_the_definition(changes):
    inputs = _inputs(**changes)
    out, gradients = _value_and_gradients(mask_by_expert, inputs)
    expected, plain = _value_and_gradients(_plain, inputs)
    assert torch.equal(out, expected)
    for mine, theirs in zip(gradients, plain, strict=True):
        assert_close(mine.reshape(-1), theirs.reshape(-1))


def test_all_tokens_on_one_expert():
    inputs = _inputs() | {"experts": torch.full((2, 7), 2)}
    for mine, theirs in zip(*(_value_and_gradients(f, inputs)[1] for f in (mask_by_expert, _plain)), strict=True):
        assert_close(mine.reshape(-1), theirs.reshape(-1))
    assert not _value_and_gradients(mask_by_expert, inputs)[1][2][:2].any()


def test_bfloat16_neurons_keep_their_dtype_and_are_exact():
    inputs = _inputs(dtype=torch.bfloat16, num_tokens=(2, 50))
    out, gradients = _value_and_gradients(mask_by_expert, inputs)
    expected, plain = _value_and_gradients(_plain, inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    for mine, theirs in zip(gradients, plain, strict=True):
        assert_close(mine.flatten(), theirs.flatten(), limit=1e-2)


@pytest.mark.parametrize("held", ["neurons", "soft_routes", "masks"])
def test_gradients_do_not_depend_on_which_are_needed(held):
    inputs = _inputs()
    whole = dict(zip(("neurons", "soft_routes", "masks"), _value_and_gradients(mask_by_expert, inputs)[1], strict=True))
    del whole[held]
    part = _value_and_gradients(mask_by_expert, inputs | {held: inputs[held].detach()})[1]
    for mine, theirs in zip(part, whole.values(), strict=True):
        assert torch.equal(mine, theirs)


def test_tolerance_catches_one_misrouted_token():
    inputs = _inputs(num_tokens=(400,))
    others = inputs["experts"].clone()
    others[7] = (others[7] + 1) % 3
    right, wrong = (
        _value_and_gradients(mask_by_expert, inputs | {"experts": e})[1] for e in (inputs["experts"], others)
    )
    assert not is_close(wrong[0], right[0])
    assert not is_close(wrong[2], right[2])
