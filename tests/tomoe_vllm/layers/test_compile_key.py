"""What shapes ToMoE's graph is part of what vLLM hashes. With engines: tests/parity/test_compile_cache.py."""

import copy
from types import SimpleNamespace

import pytest

from tests.helpers.tiny_models import tiny_config
from tomoe_vllm.kernels.expert_mlp.triton import dispatch


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    from tomoe_vllm.layers.mlp import layout

    monkeypatch.setattr(layout, "get_tensor_model_parallel_world_size", lambda: 1)


def digest(layout: str = "masked", **fields) -> str:
    from tomoe_vllm.layers.compile_key import graph_digest

    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=tiny_config("llama", **fields)))
    return graph_digest(config, layout)


def vllm_hash(layout: str, additional_config=None) -> str:
    """``VllmConfig.compute_hash()`` of an engine's config after the model was built."""
    from vllm.config import VllmConfig

    from tomoe_vllm.layers.compile_key import add_to_compile_key

    config = VllmConfig(additional_config={} if additional_config is None else additional_config)
    config.model_config = SimpleNamespace(hf_config=tiny_config("llama"))
    add_to_compile_key(config, layout)
    config.model_config = None
    return config.compute_hash()


def test_the_layout_changes_the_hash_of_vllm():
    assert vllm_hash("masked") == vllm_hash("masked")
    assert vllm_hash("masked") != vllm_hash("shared")


def test_other_additional_config_stays_in_the_hash_and_readable():
    from vllm.config import VllmConfig

    from tomoe_vllm.layers.compile_key import KEY, add_to_compile_key

    assert vllm_hash("masked") != vllm_hash("masked", {"tomoe_expert_statistics": True})
    shared_dict = {"tomoe_expert_statistics": True}
    config = VllmConfig(additional_config=shared_dict)
    config.model_config = SimpleNamespace(hf_config=tiny_config("llama"))
    add_to_compile_key(config, "masked")
    assert config.additional_config["tomoe_expert_statistics"]
    assert KEY not in shared_dict


def test_an_additional_config_that_is_an_object_is_hashed_too():
    class Custom:
        value = 3

        def compute_hash(self) -> str:
            return f"custom {self.value}"

    assert vllm_hash("masked", Custom()) != vllm_hash("shared", Custom())
    changed = Custom()
    changed.value = 4
    assert vllm_hash("masked", Custom()) != vllm_hash("masked", changed)


def test_an_additional_config_that_is_an_object_can_be_copied():
    from tomoe_vllm.layers.compile_key import _WithDigest

    wrapped = _WithDigest(SimpleNamespace(value=3, compute_hash=lambda: "hash"), "digest")
    copied = copy.deepcopy(wrapped)
    assert copied.value == 3
    assert copied.compute_hash() == wrapped.compute_hash()


def test_thresholds_change_the_digest(monkeypatch, tmp_path):
    from tomoe_vllm.layers.mlp.layout import layer_shapes

    monkeypatch.setenv(dispatch.FOLDER_VARIABLE, str(tmp_path))
    dispatch.load_thresholds.cache_clear()
    before = digest("shared")
    thresholds = dispatch.Thresholds(gather_tokens=3, grouped_tokens=640, max_tokens=8192)
    dispatch.write_table(layer_shapes(tiny_config("llama"))[0], thresholds)
    dispatch.load_thresholds.cache_clear()
    after = digest("shared")
    dispatch.load_thresholds.cache_clear()
    assert before != after


def test_overrides_of_the_config_are_in_the_hash_of_vllm(tmp_path):
    """``kv_layout`` among them: the digest leaves the config out."""
    from vllm.config import ModelConfig

    from tests.helpers.tiny_models import save_tiny_model
    from tomoe_vllm.plugin import register

    register()
    save_tiny_model(tmp_path, "llama")
    hashes = {
        ModelConfig(str(tmp_path), skip_tokenizer_init=True, hf_overrides=overrides).compute_hash()
        for overrides in ({}, {"kv_layout": "diffkv"}, {"vo_mode": "none"}, {"expert_layout": "masked"})
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("name", ["kernel_digest", "_source_digest", "_registered_ops"])
def test_kernels_sources_and_registered_ops_change_the_digest(monkeypatch, name):
    from tomoe_vllm.layers import compile_key

    before = digest()
    owner = dispatch if name == "kernel_digest" else compile_key
    monkeypatch.setattr(owner, name, lambda *arguments: "changed")
    assert digest() != before


def test_ops_that_are_registered_later_are_seen():
    import torch

    from tomoe_vllm.layers.compile_key import _registered_ops

    assert "tomoe::expert_mlp" not in _registered_ops("XLA")
    library = torch.library.Library("tomoe", "IMPL", "XLA")
    library.impl("expert_mlp", lambda *arguments: None)
    try:
        assert "tomoe::expert_mlp" in _registered_ops("XLA")
    finally:
        library._destroy()
