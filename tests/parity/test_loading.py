"""Strict loading: every tensor is used exactly once, and unsupported models fail with one clear line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import max_logprob_difference, start_engine
from tests.parity.test_families import LOGPROB_LIMIT

pytestmark = pytest.mark.engine


def edit_checkpoint(folder, *, remove=(), add=None):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in remove:
        del tensors[name]
    save_file(tensors | (add or {}), file, metadata={"format": "pt"})


def loading_error(folder, **options) -> str:
    with pytest.raises(ValueError, match=r".") as caught, start_engine(folder, **options):
        pass
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("model.layers.1.mlp.expert_gate.signature", id="signature"),
        pytest.param("model.layers.2.self_attn.q_proj.weight", id="a part of a fused matrix"),
        pytest.param("model.layers.0.self_attn.k_proj.bias", id="a part of a fused bias"),
        pytest.param("model.layers.0.self_attn.head_gate.query_key_dims", id="Q/K mask"),
        pytest.param("model.layers.0.self_attn.head_gate.value_norm.bias", id="value router"),
        pytest.param("model.norm.weight", id="outside the blocks"),
    ],
)
def test_missing_tensor_is_named(tmp_path, name):
    save_tiny_model(tmp_path, "llama")
    edit_checkpoint(tmp_path, remove=[name])
    assert f"lacks 1 tensor ({name})" in loading_error(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("model.layers.0.mlp.experts.0.weight", id="unknown module"),
        pytest.param("model.layers.0.input_layernorm.bias", id="bias, which vLLM's loader ignores silently"),
        pytest.param("model.layers.3.mlp.down_proj.weight", id="a layer too many"),
        pytest.param("model.layers.0.self_attn.qkv_proj.weight", id="vLLM's own name"),
    ],
)
def test_unused_tensor_is_named(tmp_path, name):
    save_tiny_model(tmp_path, "llama")
    edit_checkpoint(tmp_path, add={name: torch.zeros(4)})
    assert f"holds unused 1 tensor ({name})" in loading_error(tmp_path)


def test_many_missing_tensors_are_counted_and_some_named(tmp_path):
    save_tiny_model(tmp_path, "llama")
    names = [f"model.layers.{layer}.mlp.{part}" for layer in range(3) for part in ("down_proj.bias", "up_proj.bias")]
    edit_checkpoint(tmp_path, remove=names, add={"extra": torch.zeros(1)})
    message = loading_error(tmp_path)
    assert "lacks 6 tensors (model.layers.0.mlp.down_proj.bias, " in message
    assert ", ...) and holds unused 1 tensor (extra)" in message


def test_tied_checkpoint_may_contain_lm_head(tmp_path, prompts):
    model = save_tiny_model(tmp_path, "llama")
    edit_checkpoint(tmp_path, add={"lm_head.weight": model.lm_head.weight.detach().clone()})
    with start_engine(tmp_path) as engine:
        assert max_logprob_difference(model, engine.complete(prompts[:2])) < LOGPROB_LIMIT


def test_signature_with_other_widths_than_the_config_is_refused(tmp_path):
    model = save_tiny_model(tmp_path, "llama")
    name = "model.layers.1.mlp.expert_gate.signature"
    edit_checkpoint(tmp_path, add={name: torch.full_like(model.state_dict()[name], 0xFF)})
    assert f"{name} gives experts of [96, 96, 96, 96, 96] neurons; config.json says 64" in loading_error(tmp_path)


def test_query_key_mask_with_another_width_than_the_config_is_refused(tmp_path):
    model = save_tiny_model(tmp_path, "llama")
    name = "model.layers.0.self_attn.head_gate.query_key_dims"
    edit_checkpoint(tmp_path, add={name: torch.ones_like(model.state_dict()[name])})
    assert f"{name} keeps 32 dims; config.json says 16" in loading_error(tmp_path)


def test_signature_with_another_shape_is_refused(tmp_path):
    model = save_tiny_model(tmp_path, "llama")
    name = "model.layers.1.mlp.expert_gate.signature"
    edit_checkpoint(tmp_path, add={name: model.state_dict()[name][:90].clone()})
    assert f"{name} is torch.uint8 [90, 1]; it must be uint8 [96, 1]" in loading_error(tmp_path)


def test_unsupported_head_size_is_refused(tmp_path):
    save_tiny_model(tmp_path, "llama", head_dim=48)
    message = loading_error(tmp_path)
    assert "head_dim is 48" in message
    assert "CPU_ATTN" in message


def test_unknown_activation_is_refused(tmp_path):
    save_tiny_model(tmp_path, "llama", hidden_act="mish")
    assert "hidden_act is 'mish'; supported are" in loading_error(tmp_path)


def test_expert_parallel_is_refused(tmp_path):
    save_tiny_model(tmp_path, "llama")
    assert "--enable-expert-parallel does not apply" in loading_error(tmp_path, enable_expert_parallel=True)
