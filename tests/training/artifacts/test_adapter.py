"""The adapter's two files: a round trip, and one clear error for each kind of damage."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tomoe_training.artifacts.adapter import ADAPTER_CONFIG, ADAPTER_TENSORS, Adapter

from tests.helpers.students import adapter_of, random_student


@pytest.fixture
def saved(dense_folder, tmp_path):
    adapter = adapter_of(random_student(dense_folder()), dense_folder())
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def _tensors(layer):
    logits = layer.logits
    return [logits.experts, logits.query_key, logits.value, layer.router, layer.value_down, layer.value_bias,
            layer.value_norm_weight, layer.value_norm_bias, layer.value_up]  # fmt: skip


@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
def test_saved_adapter_loads_as_the_same(vo_mode, dense_folder, tmp_path):
    adapter = adapter_of(random_student(dense_folder(), vo_mode=vo_mode), dense_folder())
    adapter.save(tmp_path / "a" / "b")
    loaded = Adapter.load(tmp_path / "a" / "b")
    assert loaded.config == adapter.config
    for mine, theirs in zip(adapter.layers, loaded.layers, strict=True):
        for a, b in zip(_tensors(mine), _tensors(theirs), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {ADAPTER_TENSORS, ADAPTER_CONFIG}


def test_bfloat16_adapter_is_half_the_size_and_loads_as_float32(dense_folder, tmp_path):
    adapter = adapter_of(random_student(dense_folder()), dense_folder())
    for name, dtype in (("full", torch.float32), ("half", torch.bfloat16)):
        adapter.save(tmp_path / name, dtype)
    sizes = [sum(t.nbytes for t in load_file(tmp_path / n / ADAPTER_TENSORS).values()) for n in ("full", "half")]
    assert sizes[0] == 2 * sizes[1]
    loaded = Adapter.load(tmp_path / "half").layers[0]
    assert torch.equal(loaded.router, adapter.layers[0].router.bfloat16().float())


def test_other_folder_is_not_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not an adapter: it has no adapter_config\.json"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"base_model_name": "x"}', '{"unknown": 1}'])
def test_damaged_config_is_named(saved, text):
    (saved / ADAPTER_CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        Adapter.load(saved)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "has adapter format 2, this version reads 1"),
        ("base_model_type", "gpt2", "is for 'gpt2'; supported: llama, mistral, phi, qwen2, qwen3"),
    ],
)
def test_adapter_of_another_kind_is_refused(saved, field, value, message):
    config = json.loads((saved / ADAPTER_CONFIG).read_text())
    (saved / ADAPTER_CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=message):
        Adapter.load(saved)


@pytest.mark.parametrize("damage", ["truncated", "flipped header", "missing"])
def test_damaged_tensors_are_named(saved, damage):
    file = saved / ADAPTER_TENSORS
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-50] if damage == "truncated" else data[:8] + b"\xff" + data[9:])
    with pytest.raises(ValueError, match=r"adapter\.safetensors cannot be read"):
        Adapter.load(saved)


@pytest.mark.parametrize("name", ["expert_logits", "value_logits", "router.weight", "value_norm.bias"])
def test_missing_tensor_is_named(saved, name):
    tensors = load_file(saved / ADAPTER_TENSORS)
    del tensors[f"layers.1.{name}"]
    save_file(tensors, saved / ADAPTER_TENSORS)
    with pytest.raises(ValueError, match=f"lacks the tensor layers.1.{name}"):
        Adapter.load(saved)


def test_peft_adapter_is_told_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(ValueError, match="is a PEFT adapter, not one of tomoe train; merge it"):
        Adapter.load(tmp_path)
