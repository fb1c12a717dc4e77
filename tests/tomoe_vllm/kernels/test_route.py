"""tomoe::route and tomoe::route_recorded in C++."""

import pytest
import torch

from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.route import route, route_reference


@pytest.fixture(autouse=True, scope="module")
def compiled():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    assert build.load()


@pytest.mark.parametrize("experts", [1, 5, 8, 16])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_routes_are_the_argmax_of_the_logits(tokens, experts):
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(tokens, 75, generator=generator), torch.randn(experts, 75, generator=generator)
    assert torch.equal(torch.ops.tomoe.route(x, weight), (x.double() @ weight.double().T).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_hidden_states_are_read_in_their_own_dtype(tokens, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 75, generator=generator).to(dtype)
    weight = torch.randn(8, 75, generator=generator)
    expected = (x.double() @ weight.double().T).argmax(-1)
    assert torch.equal(route_reference(x, weight), expected)
    monkeypatch.setattr(torch.Tensor, "float", None)  # a copy of the hidden states in float32
    assert torch.equal(route(x, weight), expected)
    assert torch.equal(route(x, weight, torch.zeros(tokens, dtype=torch.uint8)), expected)


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        torch.ops.tomoe.route(torch.zeros(3, 8, dtype=torch.float64), torch.zeros(2, 8))


def test_equal_logits_go_to_the_first_expert():
    assert torch.ops.tomoe.route(torch.randn(3, 32), torch.zeros(16, 32)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("tokens", [1, 70])
def test_recorded_routes_are_the_routes(tokens):
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(tokens, 75, generator=generator), torch.randn(16, 75, generator=generator)
    record = torch.full((80,), 99, dtype=torch.uint8)
    ids = torch.ops.tomoe.route_recorded(x, weight, record)
    assert torch.equal(ids, torch.ops.tomoe.route(x, weight))
    assert torch.equal(record[:tokens].long(), ids)
    assert (record[tokens:] == 99).all()


def test_a_record_too_short_is_refused():
    with pytest.raises(RuntimeError, match=r"at least one byte per token|exceeds dimension size"):
        torch.ops.tomoe.route_recorded(torch.randn(5, 32), torch.randn(8, 32), torch.zeros(4, dtype=torch.uint8))
