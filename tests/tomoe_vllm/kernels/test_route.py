"""tomoe::route and tomoe::route_recorded in C++."""

import pytest
import torch

from tomoe_vllm.kernels import build


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
