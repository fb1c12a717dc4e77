"""Gather and grouped kernels against the reference in float64: experts of unequal width, without or with all tokens.

Float32 and float16 only: the interpreter's bf16 dot multiplies raw bits and is wrong. bf16 is compiled in
test_triton_compile.py and run by ``tomoe doctor`` on a GPU.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import assert_close, relative_rms
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton.gather import GatherConfig, expert_mlp_gather
from tomoe_vllm.kernels.expert_mlp.triton.grouped import (
    GroupedConfig,
    expert_mlp_grouped,
    group_tokens,
    grouped_config,
)
from tomoe_vllm.kernels.ops import ExpertTensors

LIMITS = {torch.float32: 1e-5, torch.float16: 1.5e-3}
"""Relative RMS. In float16, hidden and output are rounded to 2^-11 each; measured: 3e-4 overall, 4e-4 worst row."""

TINY_GATHER = GatherConfig(up_block_n=16, up_block_k=16, down_block_n=16, down_block_k=16, split_k=3)
TINY_GROUPED = GroupedConfig(block_m=16, up_block_n=32, up_block_k=16, down_block_n=16, down_block_k=16)

PATHS = {
    "gather": lambda *arguments: expert_mlp_gather(*arguments, TINY_GATHER),
    "grouped": lambda *arguments: expert_mlp_grouped(*arguments, TINY_GROUPED),
}


@dataclass
class Case:
    hidden_states: Tensor
    expert_ids: Tensor
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    masks: Tensor
    activation: str = "silu"

    def weights(self) -> ExpertTensors:
        """``neuron_ids`` is padded with each expert's last neuron."""
        rows = [mask.nonzero()[:, 0].tolist() for mask in self.masks]
        width = max(map(len, rows))
        padded = [row + [row[-1] if row else 0] * (width - len(row)) for row in rows]
        neuron_ids = torch.tensor(padded, dtype=torch.int32)
        widths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        return ExpertTensors(self.up, self.up_bias, self.down, self.masks, neuron_ids, widths, self.activation)

    def run(self, path) -> Tensor:
        return PATHS[path](self.hidden_states, self.expert_ids, self.weights())

    def expected(self) -> Tensor:
        """[T, D] float64."""
        return expert_mlp_reference(self.hidden_states.double(), self.expert_ids, self.weights().to(torch.float64))


def make_case(
    num_tokens=3, hidden_size=40, num_neurons=56, num_experts=8, is_gated=True, has_bias=False, dtype=torch.float32
) -> Case:
    """Experts of 20 % to 90 % of the neurons."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    share = torch.linspace(0.2, 0.9, num_experts)[:, None]
    masks = torch.rand(num_experts, num_neurons, generator=generator) < share
    masks[:, 0] = True
    up_rows = num_neurons * (1 + is_gated)
    return Case(
        hidden_states=randn(num_tokens, hidden_size).to(dtype),
        expert_ids=torch.randint(num_experts, (num_tokens,), generator=generator),
        up=(randn(up_rows, hidden_size) / hidden_size**0.5).to(dtype),
        up_bias=randn(up_rows).to(dtype) if has_bias else None,
        down=(randn(num_neurons, hidden_size) / num_neurons**0.5).to(dtype),
        masks=masks,
    )


SHAPES = [
    pytest.param({"num_tokens": 1}, id="one token"),
    pytest.param({"num_tokens": 3}, id="ragged widths, D and F not multiples of the blocks"),
    pytest.param({"hidden_size": 48, "num_neurons": 64}, id="D and F multiples of the blocks"),
    pytest.param({"num_tokens": 2, "num_experts": 16}, id="16 experts"),
    pytest.param({"num_tokens": 2, "num_experts": 1}, id="one expert"),
    pytest.param({"num_tokens": 2, "num_experts": 5}, id="experts not a power of two"),
    pytest.param({"num_tokens": 3, "is_gated": False, "has_bias": True}, id="no gate, bias (Phi)"),
    pytest.param({"num_tokens": 3, "has_bias": True}, id="gate and bias: two halves of the bias"),
]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_reference(path, shape, dtype):
    case = make_case(**shape, dtype=dtype)
    actual = case.run(path)
    assert actual.dtype == dtype
    assert_close(actual, case.expected(), LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "expert_ids"),
    [
        pytest.param(37, 8, None, id="groups of unequal size, padded"),
        pytest.param(37, 16, None, id="more experts than full blocks"),
        pytest.param(37, 8, [3] * 37, id="all tokens on one expert, three blocks"),
        pytest.param(16, 8, [7] * 16, id="the last expert only, block exactly full"),
        pytest.param(17, 8, [0, 7] * 8 + [0], id="experts without a token in between"),
        pytest.param(6, 16, [15, 3, 15, 0, 9, 3], id="fewer tokens than experts"),
    ],
)
def test_grouped_equals_the_reference_for_every_distribution_of_tokens(num_tokens, num_experts, expert_ids, dtype):
    case = make_case(num_tokens, num_experts=num_experts, dtype=dtype)
    if expert_ids:
        case.expert_ids = torch.tensor(expert_ids)
    assert_close(case.run("grouped"), case.expected(), LIMITS[dtype])


def test_grouped_equals_the_reference_with_the_tiles_of_a_gpu():
    case = make_case(70, num_neurons=150)
    actual = expert_mlp_grouped(case.hidden_states, case.expert_ids, case.weights(), grouped_config(1024, 8, (9, 0)))
    assert_close(actual, case.expected())


@pytest.mark.parametrize("path", PATHS)
def test_activation_is_the_requested_one(path):
    case = make_case(3, is_gated=False)
    case.activation = "gelu_new"
    assert_close(case.run(path), case.expected())


@pytest.mark.parametrize("path", PATHS)
def test_an_expert_without_neurons_gives_zeros(path):
    case = make_case(3)
    case.masks[2] = False
    case.expert_ids = torch.tensor([1, 2, 3])
    actual = case.run(path)
    assert torch.equal(actual[1], torch.zeros_like(actual[1]))
    assert_close(actual[::2], case.expected()[::2])


@pytest.mark.parametrize("path", PATHS)
def test_a_row_does_not_depend_on_its_batch(path):
    case = make_case(3)
    together = case.run(path)
    for token in range(3):
        alone = make_case(3)
        alone.hidden_states, alone.expert_ids = (
            case.hidden_states[token : token + 1],
            case.expert_ids[token : token + 1],
        )
        assert torch.equal(alone.run(path)[0], together[token])


@pytest.mark.parametrize("path", PATHS)
def test_int32_experts_and_strided_rows(path):
    case = make_case(3)
    wide = torch.full((3, 100), torch.nan)
    wide[:, :40] = case.hidden_states
    case.hidden_states, case.expert_ids = wide[:, :40], case.expert_ids.int()
    assert_close(case.run(path), case.expected())


@pytest.mark.parametrize("path", PATHS)
def test_no_token_gives_no_row(path):
    case = make_case(0)
    assert case.run(path).shape == (0, 40)


@pytest.mark.parametrize("num_tokens", [1, 5, 600])
def test_group_tokens_sorts_stably_and_pads_each_expert(num_tokens):
    block_m, num_experts = 16, 8
    expert_ids = torch.randint(num_experts, (num_tokens,), generator=torch.Generator().manual_seed(1))
    slots, block_experts, num_blocks = group_tokens(expert_ids, num_experts, block_m)
    expected_slots, expected_experts = [], []
    for expert in range(num_experts):
        own = [t for t in range(num_tokens) if expert_ids[t] == expert]
        blocks = -(-len(own) // block_m)
        expected_slots += own + [num_tokens] * (blocks * block_m - len(own))
        expected_experts += [expert] * blocks
    assert num_blocks.tolist() == [len(expected_experts)]
    assert slots[: len(expected_slots)].tolist() == expected_slots
    assert block_experts[: len(expected_experts)].tolist() == expected_experts


FAULTS = ["one token misrouted", "one row index wrong", "one neuron too few", "gate and up swapped for one neuron"]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", PATHS)
def test_tolerance_catches_small_faults(path, fault, dtype):
    case = make_case(3, dtype=dtype)
    expected = case.expected()
    assert max(relative_rms(case.run(path), expected)) < LIMITS[dtype]
    expert = case.expert_ids[0].item()
    kept = case.masks[expert].nonzero()[:, 0]
    if fault == "one token misrouted":
        case.expert_ids[0] = (expert + 1) % 8
    elif fault == "one row index wrong":
        dropped = (~case.masks[expert]).nonzero()[0, 0]
        case.masks[expert, kept[1]], case.masks[expert, dropped] = False, True
    elif fault == "one neuron too few":
        case.masks[expert, kept[-1]] = False
    else:
        pair = [kept[0].item(), kept[0].item() + 56]
        case.up[pair] = case.up[pair[::-1]].clone()
    assert max(relative_rms(case.run(path), expected)) > 5 * LIMITS[dtype]
