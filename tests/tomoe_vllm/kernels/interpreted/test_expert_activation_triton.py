"""The Triton expert activation against the plain-torch one in float64."""

import pytest
import torch

from tests.helpers.compare import assert_close, relative_rms
from tomoe_vllm.kernels.expert_activation.reference import ACTIVATIONS, expert_activation_reference
from tomoe_vllm.kernels.expert_activation.triton import KERNEL_ACTIVATIONS, expert_activation_triton

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3}
"""Relative RMS. float16 is rounded once, by 2^-11."""


def make_case(num_tokens, num_neurons, num_experts, is_gated, dtype, expert=None):
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(num_tokens, num_neurons * (1 + is_gated), generator=generator).to(dtype)
    expert_ids = torch.randint(num_experts, (num_tokens,), generator=generator)
    if expert is not None:
        expert_ids.fill_(expert)
    masks = torch.rand(num_experts, num_neurons, generator=generator) < 0.5
    masks[:, 0] = True  # so that no output row is all zeros
    return projected, expert_ids, masks


def expected_output(projected, expert_ids, masks, activation="silu"):
    return expert_activation_reference(projected.double(), expert_ids, masks.double(), activation)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, None], ids=["bool", "uint8", "model dtype"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_neurons", "num_experts", "is_gated", "expert"),
    [
        pytest.param(1, 48, 8, True, None, id="one token"),
        pytest.param(5, 1033, 8, True, None, id="two blocks, the last not full"),
        pytest.param(5, 48, 8, False, None, id="no gate: one matrix, no product of halves"),
        pytest.param(5, 48, 16, True, 15, id="all tokens on the last of 16 experts"),
    ],
)
def test_equals_the_reference(num_tokens, num_neurons, num_experts, is_gated, expert, dtype, mask_dtype):
    projected, expert_ids, masks = make_case(num_tokens, num_neurons, num_experts, is_gated, dtype, expert)
    actual = expert_activation_triton(projected, expert_ids, masks.to(mask_dtype or dtype), "silu")
    assert actual.dtype == dtype
    assert_close(actual, expected_output(projected, expert_ids, masks), LIMITS[dtype])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_equals_the_reference(activation):
    projected, expert_ids, masks = make_case(4, 48, 8, False, torch.float32)
    actual = expert_activation_triton(projected, expert_ids, masks, activation)
    assert_close(actual, expected_output(projected, expert_ids, masks, activation))


def test_activations_are_those_of_the_reference():
    assert KERNEL_ACTIVATIONS.keys() == ACTIVATIONS.keys()


def test_rows_may_be_strided():
    projected, expert_ids, masks = make_case(4, 48, 8, True, torch.float32)
    wide = torch.full((4, 100), torch.nan)
    wide[:, :96] = projected
    actual = expert_activation_triton(wide[:, :96], expert_ids, masks, "silu")
    assert_close(actual, expected_output(projected, expert_ids, masks))


def test_no_token_gives_no_row():
    projected, expert_ids, masks = make_case(0, 48, 8, True, torch.float32)
    assert expert_activation_triton(projected, expert_ids, masks, "silu").shape == (0, 48)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("fault", ["mask shifted", "one token misrouted", "one neuron lost"])
def test_tolerance_catches_small_faults(fault, dtype):
    projected, expert_ids, masks = make_case(16, 48, 8, True, dtype)
    masks[:, 7] = True
    expected = expected_output(projected, expert_ids, masks)
    if fault == "mask shifted":
        masks = masks.roll(1, dims=1)
    elif fault == "one token misrouted":
        expert_ids[3] = (expert_ids[3] + 1) % 8
    else:
        masks[:, 7] = False
    broken = expert_activation_triton(projected, expert_ids, masks, "silu")
    assert max(relative_rms(broken, expected)) > 5 * LIMITS[dtype]
