"""KV cache head sizes and attention backend that the layer chooses, on CPUs and on simulated GPUs."""

import pytest

from tests.helpers.tiny_models import tiny_config
from tomoe_vllm.layers.attention.kv_layout import HeadWidths


@pytest.fixture
def nvidia(monkeypatch):
    """Make vLLM's platform report CUDA. The tested code does not touch a device."""
    from vllm.platforms import current_platform

    import tomoe_vllm.layers.attention.attention  # noqa: F401  (first: vLLM's imports depend on the real platform)

    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)


def choose(family="llama", *, is_pruned=True, **fields):
    from tomoe_vllm.layers.attention.attention import choose_cache

    return choose_cache(tiny_config(family, **fields), is_pruned)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_padded_layout_on_a_gpu_uses_whole_heads(nvidia, layout):
    assert choose(head_dim=64, vo_mode="static", kv_layout=layout) == (HeadWidths(query_key=64, value=64), None)


def test_diffkv_has_one_key_size_and_one_value_size(nvidia):
    widths, backend = choose(head_dim=128, qk_head_dims=[40, 74, 8], kv_layout="diffkv")
    assert widths == HeadWidths(query_key=80, value=128)
    assert backend.get_name() == "TRITON_ATTN_DIFFKV"
    assert backend.head_size_v == 128
    assert backend.supports_head_size(80)
    widths, backend = choose(
        head_dim=128, qk_head_dims=[40, 74, 8], vo_mode="static", vo_head_dims=[9, 9, 72], kv_layout="diffkv"
    )
    assert (widths, backend.head_size_v) == (HeadWidths(query_key=80, value=72), 72)


def test_diffkv_is_refused_where_heads_stay_whole(nvidia):
    with pytest.raises(ValueError, match=r"quantized checkpoints, LoRA .* keep whole heads; use 'auto' or 'padded'"):
        choose(kv_layout="diffkv", is_pruned=False)


def test_whole_heads_on_a_cpu_have_head_dim():
    assert choose(head_dim=64, vo_mode="static")[0] == HeadWidths(query_key=32, value=32)
    assert choose(head_dim=64, vo_mode="static", is_pruned=False)[0] == HeadWidths(query_key=64, value=64)
