"""Expert embeddings: fixed inputs, layers that depend on each other, and the free variant."""

import pytest
import torch
from tomoe_training.method.hypernetwork import Hypernetwork


def _network(**fields):
    torch.manual_seed(0)
    return Hypernetwork(**({"num_modules": 6, "num_experts": 3, "embedding_size": 8} | fields))


def test_embeddings_are_one_row_per_module_and_expert():
    assert _network()().shape == (6, 3, 8)
    assert _network(is_local=True)().shape == (6, 3, 8)


def test_gru_of_the_paper_has_37632_parameters():
    # Two directions of 3 * (32 + 64 + 2) * 64 (method.md 1.1); the inputs are fixed and not among them.
    network = Hypernetwork(num_modules=64, num_experts=8, embedding_size=128)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 2 * 3 * (32 + 64 + 2) * 64 == 37_632
    assert network.z.shape == (64, 8, 32)
    assert "z" in network.state_dict()


def test_every_layer_depends_on_its_neighbours_and_experts_do_not_mix():
    network = _network()
    before = network()
    network.z[2, 1] += 1
    changed = (network() - before).abs().amax(dim=-1) > 0
    assert changed[:, 1].all()  # forwards and backwards in depth
    assert not changed[:, [0, 2]].any()


def test_local_embeddings_are_free():
    network = _network(is_local=True)
    network()[2, 1].sum().backward()
    assert network.embeddings.grad.count_nonzero().item() == 8


def test_odd_size_is_an_error():
    with pytest.raises(ValueError, match="value_router_dim is 7; it must be even"):
        _network(embedding_size=7)
