"""The Triton value mask against the equations in float64, with ties resolved as torch.topk does on a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.compare import assert_close
from tomoe_vllm.hf.tomoe_math import top_mask
from tomoe_vllm.kernels.ops import ValueRouter
from tomoe_vllm.kernels.value_mask import _cuda, mask_values_reference, rejected_kernels
from tomoe_vllm.kernels.value_mask.triton import FEW_TOKENS, MAX_SPLITS, mask_values_triton, value_down

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_case(num_tokens, *, hidden_size=75, rank=50, head_dim=64, num_heads=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    attention, hidden_states = randn(num_tokens, num_heads * head_dim).to(dtype), randn(num_tokens, hidden_size)
    router = ValueRouter(
        down_weight=randn(rank, hidden_size) * hidden_size**-0.5,
        down_bias=randn(rank),
        norm_weight=1 + 0.2 * randn(rank),
        norm_bias=0.2 * randn(rank),
        up_weight=randn(head_dim, rank) / rank**0.5,
    )
    return attention, hidden_states.to(dtype), router


def wide_logits(hidden_states, router):
    """Eq. 5 in float64."""
    down, bias, norm_weight, norm_bias, up = (tensor.double() for tensor in router)
    embedding = F.layer_norm(hidden_states.double() @ down.T + bias, (len(down),), norm_weight, norm_bias)
    return 0.5 * embedding * (1 + torch.erf(embedding * math.sqrt(0.5))) @ up.T


def stable_top_mask(logits, width):
    """``top_mask`` with the first of equal logits found, and NaN as the largest."""
    keeps_most = 2 * width > logits.shape[1]
    order = logits.argsort(dim=1, descending=not keeps_most, stable=True)
    found = order[:, : logits.shape[1] - width if keeps_most else width]
    return torch.full_like(logits, keeps_most, dtype=torch.bool).scatter_(1, found, not keeps_most)


def kept(output, head_dim):
    """Mask of each token; asserts that it is the same in every head."""
    heads = (output != 0).unflatten(1, (-1, head_dim))
    assert (heads == heads[:, :1]).all()
    return heads[:, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "sizes", "width"),
    [
        pytest.param(1, {"hidden_size": 1024, "rank": 128, "head_dim": 128}, 64, id="one token, whole blocks, slices"),
        pytest.param(3, {}, 1, id="ragged sizes, one dim kept"),
        pytest.param(3, {"head_dim": 80}, 57, id="head_dim 80, most dims kept"),
        pytest.param(2, {"head_dim": 96, "rank": 128, "num_heads": 70}, 48, id="head_dim 96, heads in two blocks"),
        pytest.param(2, {"head_dim": 256, "rank": 130}, 255, id="head_dim 256, W_up in chunks, one dim dropped"),
        pytest.param(FEW_TOKENS + 2, {"rank": 40}, 20, id="many tokens, the last tile not full"),
        pytest.param(2 * FEW_TOKENS, {"rank": 128, "hidden_size": 128}, 32, id="many tokens, whole tiles"),
    ],
)
def test_equals_the_equations(num_tokens, sizes, width, dtype):
    attention, hidden_states, router = make_case(num_tokens, dtype=dtype, **sizes)
    head_dim = len(router.up_weight)
    logits = wide_logits(hidden_states, router)
    ordered = logits.sort(dim=1, descending=True).values
    is_clear = ordered[:, width - 1] - ordered[:, width] > 1e-5
    assert is_clear.float().mean() > 0.9
    before = attention.clone()
    output = mask_values_triton(attention, hidden_states, router, width)
    mask = kept(output, head_dim)
    assert output.dtype == dtype
    assert (mask.sum(dim=1) == width).all()
    assert torch.equal(mask[is_clear], top_mask(logits, width)[is_clear])
    assert torch.equal(output, attention * mask.repeat(1, attention.shape[1] // head_dim)), "values are not changed"
    assert torch.equal(attention, before), "the input must not change"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS + 2])
def test_down_projection_is_as_accurate_as_float32(num_tokens, dtype):
    """Also with bfloat16 hidden states: the float32 weights must not be rounded to 16 bits."""
    _, hidden_states, router = make_case(num_tokens, hidden_size=1000, rank=40, dtype=dtype)
    partial = value_down(hidden_states, router.down_weight)
    assert partial.shape[0] <= MAX_SPLITS
    assert_close(partial.double().sum(dim=0), hidden_states.double() @ router.down_weight.double().T, 3e-7)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_of_equal_logits_the_first_are_found(head_dim, share, distinct):
    width = max(1, round(head_dim * share))
    attention, hidden_states, router = make_case(2, head_dim=head_dim)
    up = router.up_weight[:distinct].repeat_interleave(-(-head_dim // distinct), dim=0)[:head_dim]
    router = router._replace(up_weight=up)
    mask = kept(mask_values_triton(attention, hidden_states, router, width), head_dim)
    # Equal rows have equal logits in float64 too.
    assert torch.equal(mask, stable_top_mask(wide_logits(hidden_states, router), width))
    assert (mask.sum(dim=1) == width).all()


@pytest.mark.parametrize("width", [20, 50], ids=["few kept", "most kept"])
def test_nan_logits_are_the_largest_and_nan_values_stay(width):
    attention, hidden_states, router = make_case(2)
    hidden_states[1] = torch.nan
    router.up_weight[60] = torch.nan
    mask = kept(mask_values_triton(attention, hidden_states, router, width), 64)
    assert torch.equal(mask, stable_top_mask(wide_logits(hidden_states, router), width))
    assert mask[0, 60]
    attention[0] = torch.nan
    output = mask_values_triton(attention, hidden_states, router, width)
    assert output[0].isnan().all(), "0 * NaN is NaN, as in the reference"


def test_rows_may_be_strided():
    attention, hidden_states, router = make_case(3)
    wide = torch.full((3, 500), torch.nan)
    wide[:, :192], wide[:, 200:275] = attention, hidden_states
    actual = mask_values_triton(wide[:, :192], wide[:, 200:275], router, 30)
    assert torch.equal(actual, mask_values_triton(attention, hidden_states, router, 30))


def test_no_token_gives_no_row():
    assert mask_values_triton(*make_case(0), 30).shape == (0, 192)


def test_the_op_on_cuda_takes_triton_unless_it_was_rejected(monkeypatch):
    attention, hidden_states, router = make_case(3, dtype=torch.bfloat16)
    calls = []
    monkeypatch.setattr("tomoe_vllm.kernels.value_mask.triton.mask_values_triton", lambda *case: calls.append(case))
    _cuda(attention, hidden_states, *router, 30)
    assert len(calls) == 1
    monkeypatch.setattr("tomoe_vllm.kernels.value_mask.rejected_kernels", {*rejected_kernels, "mask_values"})
    expected = mask_values_reference(attention, hidden_states, router, 30)
    assert torch.equal(_cuda(attention, hidden_states, *router, 30), expected)
    assert len(calls) == 1
    assert torch._C._dispatch_has_kernel_for_dispatch_key("tomoe::mask_values", "CUDA")
