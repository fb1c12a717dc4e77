"""Masks that a reload leaves out or replaces. With engines: tests/parity/test_reload.py."""

import pytest
import torch

from tests.helpers.tiny_models import tiny_config
from tomoe_vllm.hf.tomoe_math import pack_signature


@pytest.fixture
def make_router(monkeypatch):
    """Makes the router of a tensor-parallel rank."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from tomoe_vllm.layers.mlp import router

    def make(rank: int, tp_size: int):
        monkeypatch.setattr(router, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(router, "get_tensor_model_parallel_world_size", lambda: tp_size)
        with set_current_vllm_config(VllmConfig()):
            return router.ToMoERouter(tiny_config("llama"), 0, "mlp.expert_gate")

    return make


def signature(router, num_first: int) -> torch.Tensor:
    """Every expert keeps ``num_first`` neurons of the first half, and the rest of its width in the second half."""
    half = router.num_neurons // 2
    kept = torch.zeros(router.num_experts, router.num_neurons, dtype=torch.bool)
    kept[:, :num_first] = True
    kept[:, half : half + router.width - num_first] = True
    return pack_signature(kept)


def load(router, loaded: torch.Tensor) -> None:
    router.signature.weight_loader(router.signature, loaded)


@pytest.mark.parametrize("byte", [0, 255])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_discarded_signature_is_refused_until_it_is_loaded_again(make_router, rank, byte):
    router = make_router(rank, 2)
    loaded = signature(router, router.width // 2 - 3)
    load(router, loaded)
    router.set_masks(router.masks())
    masks = router.expert_masks.clone()
    router.set_masks(router.masks())  # a reload without the masks
    router.signature.data.fill_(byte)  # sleep level 2
    with pytest.raises(ValueError, match=r"mlp\.expert_gate\.signature .* include the masks in the reload"):
        router.set_masks(router.masks())
    load(router, loaded)
    router.set_masks(router.masks())
    assert torch.equal(router.expert_masks, masks)


@pytest.mark.parametrize("change", [-1, 1])
def test_all_ranks_refuse_widths_that_do_not_fit_on_one_of_them(make_router, change):
    routers = [make_router(rank, 2) for rank in range(2)]
    for router in routers:
        first = router.width // 2
        load(router, signature(router, first))
        router.set_masks(router.masks())
        with pytest.raises(ValueError, match="restart it on the new checkpoint"):
            load(router, signature(router, first + change))
        load(router, signature(router, first))
        router.set_masks(router.masks())


def test_narrower_widths_fit(make_router):
    router = make_router(0, 2)
    wide, narrow = signature(router, router.width // 2 + 2), signature(router, router.width // 2 - 2)
    mixed = wide.clone()
    mixed[:] = narrow & 0b00001 | wide & 0b11110  # one expert is wider on rank 1, the others on rank 0
    load(router, mixed)
    router.set_masks(router.masks())
    num_columns = router.neuron_ids.shape[1]
    load(router, narrow)
    router.set_masks(router.masks())
    assert router.neuron_ids.shape[1] == num_columns
    assert router.widths.tolist() == [router.width // 2 - 2] * router.num_experts
