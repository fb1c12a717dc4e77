"""The expert activation against a scalar loop over tokens, neurons and signature bits."""

import math

import pytest
import torch

from tests.helpers.compare import assert_close, relative_rms
from tomoe_vllm.hf.tomoe_math import pack_signature
from tomoe_vllm.kernels.expert_activation import ACTIVATIONS, expert_activation

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Relative RMS. bf16: three roundings (activation, product) of 2^-9 each; fp32 as everywhere."""

SCALARS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def expected_output(projected, expert_ids, signature, activation, num_neurons):
    """[T, F] float64, from the signature's bits."""
    is_gated = projected.shape[1] == 2 * num_neurons
    output = torch.zeros(projected.shape[0], num_neurons, dtype=torch.float64)
    for token, expert in enumerate(expert_ids.tolist()):
        for neuron in range(num_neurons):
            if signature[neuron, expert // 8].item() >> (expert % 8) & 1:
                value = SCALARS[activation](projected[token, neuron].item())
                output[token, neuron] = value * (projected[token, num_neurons + neuron].item() if is_gated else 1.0)
    return output


def make_case(num_tokens, num_neurons, num_experts, is_gated, dtype=torch.float32, expert=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(num_tokens, num_neurons * (1 + is_gated), generator=generator).to(dtype)
    expert_ids = torch.randint(num_experts, (num_tokens,), generator=generator)
    if expert is not None:
        expert_ids.fill_(expert)
    masks = torch.rand(num_experts, num_neurons, generator=generator) < 0.5
    masks[:, 0] = True  # no expert is empty
    return projected, expert_ids, masks.to(dtype), pack_signature(masks)


CASES = [
    pytest.param(1, 48, 8, True, None, id="one token"),
    pytest.param(17, 33, 8, True, None, id="ragged width"),
    pytest.param(16, 48, 8, False, None, id="no gate: halves must not be multiplied"),
    pytest.param(16, 48, 5, True, 4, id="all tokens on the last expert; others have none"),
    pytest.param(16, 48, 1, True, None, id="one expert"),
    pytest.param(16, 48, 12, True, 11, id="signature of two bytes"),
]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_neurons", "num_experts", "is_gated", "expert"), CASES)
def test_equals_the_reference(num_tokens, num_neurons, num_experts, is_gated, expert, dtype):
    projected, expert_ids, masks, signature = make_case(num_tokens, num_neurons, num_experts, is_gated, dtype, expert)
    before = projected.clone()
    actual = expert_activation(projected, expert_ids, masks, "silu")
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    expected = expected_output(projected, expert_ids, signature, "silu", num_neurons)
    assert_close(actual, expected, LIMITS[dtype])
    assert torch.equal(projected, before), "the input must not change"


@pytest.mark.parametrize("activation", SCALARS)
def test_activations_are_those_of_hugging_face(activation):
    projected, expert_ids, masks, signature = make_case(8, 48, 8, False)
    actual = expert_activation(projected, expert_ids, masks, activation)
    assert_close(actual, expected_output(projected, expert_ids, signature, activation, 48))


def test_every_activation_is_tested_or_an_alias_of_one():
    aliases = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}
    assert ACTIVATIONS.keys() == SCALARS.keys() | aliases.keys()
    assert all(ACTIVATIONS[alias] is ACTIVATIONS[name] for alias, name in aliases.items())


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda masks, ids: (masks.roll(1, dims=1), ids), id="masks shifted by one neuron"),
        pytest.param(
            lambda masks, ids: (masks, ids.where(torch.arange(len(ids)) > 0, ids + 1)), id="one token misrouted"
        ),
        pytest.param(lambda masks, ids: (torch.ones_like(masks), ids), id="no mask"),
        pytest.param(lambda masks, ids: (masks.index_fill(1, torch.tensor([7]), 0), ids), id="one neuron lost"),
    ],
)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_tolerance_catches_small_faults(break_it, dtype):
    projected, _, masks, signature = make_case(64, 48, 8, True, dtype)
    expert_ids = torch.zeros(64, dtype=torch.int64)
    signature[7] |= 0xFF
    masks[:, 7] = 1
    expected = expected_output(projected, expert_ids, signature, "silu", 48)
    assert max(relative_rms(expert_activation(projected, expert_ids, masks, "silu"), expected)) < LIMITS[dtype]
    broken_masks, broken_ids = break_it(masks, expert_ids)
    broken = expert_activation(projected, broken_ids, broken_masks, "silu")
    assert max(relative_rms(broken, expected)) > 5 * LIMITS[dtype]


def test_traces_once_for_every_number_of_tokens():
    """A host sync or a data-dependent shape would break the graph; a static number of tokens would recompile."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(expert_activation, backend=backend, fullgraph=True, dynamic=True)
    for num_tokens in (2, 5, 16):
        projected, expert_ids, masks, _ = make_case(num_tokens, 48, 8, True)
        assert torch.equal(
            compiled(projected, expert_ids, masks, "silu"), expert_activation(projected, expert_ids, masks, "silu")
        )
    assert len(graphs) == 1


def test_an_unknown_activation_error_lists_the_known_ones():
    projected, expert_ids, masks, _ = make_case(2, 48, 8, True)
    with pytest.raises(ValueError, match=r"hidden_act is 'swish2'; supported are gelu, .*silu"):
        expert_activation(projected, expert_ids, masks, "swish2")


def test_a_width_that_fits_no_mask_is_an_error():
    projected, expert_ids, masks, _ = make_case(2, 48, 8, True)
    with pytest.raises(ValueError, match=r"projected has 95 columns; .* 96 .* or 48"):
        expert_activation(projected[:, :95], expert_ids, masks, "silu")
