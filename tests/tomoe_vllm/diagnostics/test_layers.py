"""Sizes of the layers that are checked."""

import json

import pytest

from tomoe_vllm.diagnostics.layers import LLAMA, PHI, TINY, layer_of


@pytest.mark.parametrize(
    ("config", "expected", "gates"),
    [
        pytest.param(
            {"model_type": "llama", "hidden_act": "silu"}, (704, 8, 3, "silu", False), (64, 32, 128), id="dense"),
        pytest.param(
            {"model_type": "tomoe_phi", "num_experts": 16, "expert_intermediate_sizes": [96, 320],
             "hidden_act": "gelu_new", "vo_head_dims": [24, 64, 40], "value_router_dim": 32},
            (320, 16, 2, "gelu_new", True), (64, 40, 32), id="checkpoint, no gate, one layer without value mask"),
    ],
)  # fmt: skip
def test_sizes_come_from_the_model_config(config, expected, gates, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(sizes | config))
    layer = layer_of(tmp_path)
    mlp = layer.mlp
    assert (mlp.width, mlp.num_experts, mlp.num_matrices, layer.activation, layer.has_bias) == expected
    assert (mlp.hidden_size, mlp.num_neurons) == (512, 1408)
    assert (layer.gates.head_dim, layer.gates.width, layer.gates.rank) == gates
    assert layer.gates.num_heads == 8


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("layer", [LLAMA, PHI])
def test_a_rank_has_its_share_of_neurons_and_heads(layer, num_ranks):
    share = layer.share(num_ranks)
    assert share.mlp.num_neurons * num_ranks == layer.mlp.num_neurons
    assert share.mlp.active_ratio == layer.mlp.active_ratio
    assert share.gates.num_heads * num_ranks == 32
    assert share.mlp.hidden_size == share.gates.hidden_size == layer.mlp.hidden_size


def test_sizes_that_do_not_divide_have_no_share():
    assert TINY.share(2).name == "tiny, TP 2"
    assert TINY.share(4) is None
