"""The checkpoint config: shapes of the families, and refused values."""

import pytest
from transformers import GPT2Config, PhiConfig, Qwen2Config

from tests.helpers.dense_models import dense_config
from tests.helpers.tiny_models import FAMILY_FIELDS, tiny_config
from tomoe_vllm.hf.configuration_tomoe import base_model_type, block_shape, family_of


def test_unset_widths_mean_everything_is_kept():
    config = tiny_config("llama", expert_intermediate_sizes=None, qk_head_dims=None, vo_head_dims=None)
    assert config.expert_intermediate_sizes == [96] * 3
    assert config.qk_head_dims == config.vo_head_dims == [32] * 3


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_config_survives_saving(family, tmp_path):
    config = tiny_config(family, base_model_hash="sha256:0", active_ratio=0.25)
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vo_mode": "fast"}, "vo_mode is 'fast'; it must be one of dynamic, static, none"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"qk_head_dims": [16, 31, 24]}, r"qk_head_dims\[1\] is 31; .*must be even.*--head-dim-multiple 2"),
        ({"qk_head_dims": [16, 32]}, "qk_head_dims has 2 entries; the model has 3 layers"),
        ({"qk_head_dims": [16, 34, 24]}, r"qk_head_dims\[1\] is 34; it must be between 1 and 32"),
        ({"vo_head_dims": [16, 0, 32]}, r"vo_head_dims\[1\] is 0"),
        ({"expert_intermediate_sizes": [32, 64, 97]}, r"expert_intermediate_sizes\[2\] is 97"),
        ({"expert_intermediate_sizes": [-1, 64, 96]}, r"expert_intermediate_sizes\[0\] is -1"),
    ],
)
def test_widths_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("llama", **fields)


def test_odd_dims_are_allowed_where_some_dims_are_single():
    assert tiny_config("phi", qk_head_dims=[15, 32, 24]).qk_head_dims[0] == 15


def test_unsupported_family_error_lists_the_supported():
    with pytest.raises(ValueError, match="'gpt2' is not a supported family; supported: llama, mistral, phi, qwen2"):
        base_model_type(GPT2Config())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PhiConfig(qk_layernorm=True), "qk_layernorm"),
        (Qwen2Config(use_sliding_window=True), "sliding-window"),
    ],
)
def test_unsupported_variants_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        base_model_type(config)


def test_shape_of_phi_2_has_32_rotated_of_80_dims():
    shape = block_shape(PhiConfig(hidden_size=2560, num_attention_heads=32, intermediate_size=10240, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4,
    }))  # fmt: skip
    assert (shape.head_dim, shape.rotary_dim, shape.num_kv_heads, shape.num_mlp_matrices) == (80, 32, 32, 2)


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_dense_and_converted_config_describe_the_same_block(family):
    tomoe, dense = tiny_config(family), dense_config(family)
    assert base_model_type(tomoe) == base_model_type(dense) == family
    assert family_of(tomoe) is family_of(dense)
    shape = block_shape(dense)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rotary_dim)
    assert heads == {"phi": (4, 4, 20, 8)}.get(family, (4, 2, 16, 16))
