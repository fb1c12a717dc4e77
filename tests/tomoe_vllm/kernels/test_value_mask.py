"""The value mask in C++ against the reference: the same dims kept, also on ties."""

import pytest
import torch

from tests.helpers.compare import assert_close
from tomoe_vllm.hf.tomoe_math import top_mask, value_logits
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.ops import ValueRouter
from tomoe_vllm.kernels.value_mask import mask_values, mask_values_reference


@pytest.fixture(autouse=True, scope="module")
def compiled():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    assert build.load()


def make_case(tokens, *, hidden=75, rank=50, head=64, heads=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    attention, hidden_states = random(tokens, heads * head).to(dtype), random(tokens, hidden).to(dtype)
    down, bias = random(rank, hidden) * hidden**-0.5, random(rank)
    router = ValueRouter(down, bias, 1 + 0.2 * random(rank), 0.2 * random(rank), random(head, rank))
    return attention, hidden_states, router


@pytest.mark.parametrize("width", [1, 20, 32, 33, 57, 63, 64], ids=lambda width: f"keep {width} of 64")
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_equals_the_reference(tokens, width):
    case = make_case(tokens)
    before = case[0].clone()
    attention, hidden_states, router = case
    wide_router = ValueRouter(*[t.double() for t in router])
    wide = mask_values_reference(attention.double(), hidden_states.double(), wide_router, width)
    actual = mask_values(*case, width)
    assert torch.equal(actual != 0, wide != 0)
    assert_close(actual, wide)
    assert ((actual != 0).sum(dim=1) == 3 * width).all()
    assert torch.equal(case[0], before), "the input must not change"


@pytest.mark.parametrize("head", [32, 64, 128, 130])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_ties_are_resolved_as_in_the_reference(head, share, distinct):
    width = max(1, round(head * share))
    _, hidden_states, router = make_case(6, head=head)
    up = router.up_weight[:distinct].repeat_interleave(-(-head // distinct), dim=0)[:head].round(decimals=1)
    router = router._replace(up_weight=up)
    logits = value_logits(hidden_states, *router)
    exact = all(len(row.unique()) <= distinct for row in logits)
    assert exact, "torch gives equal rows equal logits"
    expected = top_mask(logits, width)
    actual = mask_values(torch.ones(6, 2 * head), hidden_states, router, width)
    assert torch.equal(actual.unflatten(1, (2, head)).bool(), expected[:, None].expand(-1, 2, -1))


def test_a_token_does_not_depend_on_its_batch():
    case = make_case(30)
    whole = mask_values(*case, 30)
    alone = [mask_values(case[0][t : t + 1], case[1][t : t + 1], *case[2:], 30) for t in range(30)]
    assert torch.equal(torch.cat(alone), whole)


def test_one_dim_too_few_is_detected():
    case = make_case(5)
    assert not torch.equal(mask_values(*case, 31) != 0, mask_values_reference(*case, 32) != 0)


def test_bfloat16_stays_in_torch():
    case = make_case(5, dtype=torch.bfloat16)
    actual = mask_values(*case, 32)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, mask_values_reference(*case, 32))


def test_operator_registration_is_sound():
    case = make_case(3)
    torch.library.opcheck(torch.ops.tomoe.mask_values.default, (*case[:2], *case[2], 32))
