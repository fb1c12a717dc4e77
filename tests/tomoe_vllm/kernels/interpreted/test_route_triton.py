"""The Triton route kernels against the argmax of float64 logits."""

import pytest
import torch

from tomoe_vllm.kernels.ops import rejected_kernels
from tomoe_vllm.kernels.route import _route_cuda, route_reference
from tomoe_vllm.kernels.route.triton import MAX_TOKEN_PROGRAMS, route_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANY = MAX_TOKEN_PROGRAMS + 5
"""Tokens for route_tile_kernel, the last tile not full."""


def make_case(num_tokens, hidden_size, num_experts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    return hidden_states, torch.randn(num_experts, hidden_size, generator=generator) / hidden_size**0.5


def clear(hidden_states, weight):
    """Expert of each token in float64, and whether it wins by more than float32 sums differ."""
    logits = hidden_states.double() @ weight.double().T
    best = logits.topk(min(2, logits.shape[1])).values
    return logits.argmax(-1), best[:, 0] - best[:, -1] > 1e-5 if logits.shape[1] > 1 else torch.ones(len(best)) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "num_experts"),
    [
        pytest.param(1, 1024, 8, id="one token, whole steps"),
        pytest.param(3, 1000, 5, id="few tokens; D and N no multiple of a block"),
        pytest.param(2, 75, 255, id="255 experts"),
        pytest.param(2, 40, 1, id="one expert"),
        pytest.param(MANY, 256, 8, id="many tokens, whole steps"),
        pytest.param(MANY, 75, 17, id="many tokens; D and N no multiple of a block"),
        pytest.param(MANY, 75, 255, id="many tokens, 255 experts"),
    ],
)
def test_routes_are_the_argmax_of_the_logits(num_tokens, hidden_size, num_experts, dtype):
    hidden_states, weight = make_case(num_tokens, hidden_size, num_experts, dtype)
    record = torch.full((num_tokens + 3,), 255, dtype=torch.uint8)
    expert_ids = route_triton(hidden_states, weight, record)
    expected, is_clear = clear(hidden_states, weight)
    assert is_clear.float().mean() > 0.9
    assert expert_ids.dtype == torch.int64
    assert torch.equal(expert_ids[is_clear], expected[is_clear])
    assert torch.equal(record[:num_tokens].long(), expert_ids)
    assert (record[num_tokens:] == 255).all()
    assert torch.equal(route_triton(hidden_states, weight), expert_ids), "without a record"


@pytest.mark.parametrize("num_tokens", [2, MANY])
@pytest.mark.parametrize("first", [0, 3])
def test_equal_logits_go_to_the_first_expert(num_tokens, first):
    hidden_states, weight = make_case(num_tokens, 64, 8)
    weight = weight[:1].repeat(8, 1)
    weight[:first] = -100 * hidden_states.abs().max() * weight.abs().max()
    hidden_states = hidden_states.abs()
    expected = (hidden_states @ weight.T)[:, [0, first]].argmax(dim=1).ne(0) * first
    assert torch.equal(route_triton(hidden_states, weight), expected)
    assert (expected == first).all()


@pytest.mark.parametrize("num_tokens", [2, MANY])
def test_nan_is_the_largest_logit(num_tokens):
    hidden_states, weight = make_case(num_tokens, 64, 8)
    hidden_states[1] = torch.nan
    assert route_triton(hidden_states, weight)[1] == 0, "all logits are NaN"
    weight[5] = torch.nan
    weight[6] = torch.nan
    assert torch.equal(route_triton(hidden_states, weight), route_reference(hidden_states, weight))
    assert route_triton(hidden_states, weight)[0] == 5


@pytest.mark.parametrize("num_tokens", [2, MANY])
def test_rows_may_be_strided(num_tokens):
    hidden_states, weight = make_case(num_tokens, 64, 8)
    wide = torch.full((num_tokens, 100), torch.nan)
    wide[:, :64] = hidden_states
    assert torch.equal(route_triton(wide[:, :64], weight), route_triton(hidden_states, weight))


def test_no_token_gives_no_expert():
    assert route_triton(*make_case(0, 64, 8), torch.zeros(0, dtype=torch.uint8)).shape == (0,)


def test_a_record_too_short_is_refused():
    with pytest.raises(ValueError, match="the record holds 2 tokens"):
        route_triton(*make_case(3, 64, 8), torch.zeros(2, dtype=torch.uint8))


def test_products_are_as_accurate_as_float32():
    """Experts that differ in the last bits of their weights, which one or two bfloat16 parts of a weight would lose."""
    hidden_states, weight = make_case(MANY, 64, 1, torch.bfloat16)
    last_bits = (2.0**-22) * weight * torch.sign(hidden_states[0].float() * weight)
    expected = route_triton(hidden_states[:1].repeat(MANY, 1), torch.cat([weight, weight + last_bits, weight]))
    assert (expected == 1).all()


def test_the_op_on_cuda_takes_triton_unless_it_was_rejected(monkeypatch):
    case = make_case(3, 64, 8, torch.bfloat16)
    calls = []
    monkeypatch.setattr("tomoe_vllm.kernels.route.triton.route_triton", lambda *case: calls.append(case))
    _route_cuda(*case)
    assert len(calls) == 1
    monkeypatch.setattr("tomoe_vllm.kernels.route.rejected_kernels", {*rejected_kernels, "route"})
    assert torch.equal(_route_cuda(*case), route_reference(*case))
    assert len(calls) == 1
    for name in ("route", "route_recorded"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tomoe::{name}", "CUDA")
