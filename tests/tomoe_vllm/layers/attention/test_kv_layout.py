"""Head sizes of the KV cache, computed from a config."""

import pytest

from tests.helpers.tiny_models import tiny_config
from tomoe_vllm.layers.attention.kv_layout import (
    CPU_HEAD_SIZES,
    HeadWidths,
    diffkv_widths,
    kept_widths,
    padded_widths,
    values_per_token,
)


def widths(query_key: int, value: int) -> HeadWidths:
    return HeadWidths(query_key=query_key, value=value)


@pytest.mark.parametrize(
    ("family", "fields", "padded", "diffkv"),
    [
        pytest.param("llama", {"head_dim": 64}, 64, (32, 64), id="value masks of each token need whole values"),
        pytest.param("llama", {"head_dim": 64, "vo_mode": "static"}, 32, (32, 32), id="all fit 32"),
        pytest.param(
            "llama",
            {"head_dim": 128, "vo_mode": "static", "qk_head_dims": [66, 8, 8], "vo_head_dims": [8, 72, 8]},
            80,
            (80, 72),
            id="the widest layer decides, for keys and values separately",
        ),
        pytest.param(
            "llama",
            {"head_dim": 128, "vo_mode": "static", "qk_head_dims": [114, 8, 8]},
            128,
            (128, 32),
            id="no smaller size fits",
        ),
        pytest.param("llama", {"head_dim": 64, "qk_head_dims": [8, 8, 8]}, 64, (32, 64), id="at least 32 for diffkv"),
        pytest.param("qwen3", {"vo_mode": "static"}, 64, (64, 32), id="q and k behind a norm stay whole"),
    ],
)
def test_widths(family, fields, padded, diffkv):
    config = tiny_config(family, **fields)
    assert padded_widths(config, CPU_HEAD_SIZES) == widths(padded, padded)
    assert padded_widths(config) == widths(config.head_dim, config.head_dim)
    assert diffkv_widths(config) == widths(*diffkv)


def test_kept_widths_are_those_of_the_layer():
    config = tiny_config("llama", vo_mode="static")
    kept = [kept_widths(config, layer) for layer in range(3)]
    assert kept == [widths(16, 16), widths(32, 7), widths(24, 32)]


def test_values_per_token_of_all_layers_and_key_value_heads():
    config = tiny_config("llama", num_key_value_heads=2)
    assert values_per_token(config, widths(48, 64)) == 3 * 2 * (48 + 64)


def test_cpu_head_sizes_are_those_of_vllm():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
