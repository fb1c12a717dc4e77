"""Safetensors files: headers, damaged files, fingerprints."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tomoe_training.artifacts.safetensors_io import (
    INDEX_NAME,
    copy_tensors,
    fingerprint,
    read_header,
    stored_tensors,
    write_tensors,
)

from tests.helpers.dense_models import save_dense_model


@pytest.fixture
def model_folder(tmp_path):
    save_dense_model(tmp_path / "model", "llama")
    return tmp_path / "model"


def _file(folder):
    return folder / "model.safetensors"


def test_header_has_dtypes_shapes_and_sizes(model_folder):
    tensors = read_header(_file(model_folder))
    expected = load_file(_file(model_folder))
    assert tensors.keys() == expected.keys()
    for name, stored in tensors.items():
        assert (stored.dtype, stored.shape) == ("F32", tuple(expected[name].shape))
        assert stored.num_bytes == expected[name].nbytes


def test_fingerprint_is_the_hash_of_names_dtypes_shapes_and_stored_bytes(tmp_path):
    """Written out over the raw file. Shipped adapters name their base by it, so it may not change."""
    tensors = {
        "scalar": torch.tensor(1.5),
        "bfloat16": torch.randn(3, 4).bfloat16(),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 2),
        "nan": torch.tensor([float("nan"), -float("nan")]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    data = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    digest = hashlib.sha256()
    for name, entry in sorted(json.loads(data[8 : 8 + length]).items()):
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        digest.update(f"{name}\0{entry['dtype']}\0{tuple(entry['shape'])}\0".encode() + data[start:end])
    assert fingerprint(tmp_path) == f"sha256:{digest.hexdigest()}"


def test_fingerprint_does_not_depend_on_sharding(model_folder, tmp_path):
    save_dense_model(tmp_path / "sharded", "llama", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert fingerprint(tmp_path / "sharded") == fingerprint(model_folder)


def test_fingerprint_does_not_depend_on_the_order_in_the_file(model_folder):
    before = fingerprint(model_folder)
    tensors = load_file(_file(model_folder))
    save_file(dict(reversed(tensors.items())), _file(model_folder), metadata={"format": "pt", "more": "text"})
    assert fingerprint(model_folder) == before


def test_fingerprint_sees_one_flipped_bit(model_folder):
    before = fingerprint(model_folder)
    data = bytearray(_file(model_folder).read_bytes())
    data[-1] ^= 1
    _file(model_folder).write_bytes(data)
    assert fingerprint(model_folder) != before


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "missing"])
def test_fingerprint_sees_names_shapes_and_dtypes(model_folder, change):
    before = fingerprint(model_folder)
    tensors = load_file(_file(model_folder))
    name = "model.norm.weight"
    tensor = tensors.pop(name)
    if change == "name":
        tensors["model.norm.weighs"] = tensor
    if change == "shape":
        tensors[name] = tensor.view(1, -1)
    if change == "dtype":
        tensors[name] = tensor.view(torch.int32)
    save_file(tensors, _file(model_folder))
    assert fingerprint(model_folder) != before


def _truncate(data):
    return data[:-100]


def _flip_header(data):
    return data[:8] + bytes([data[8] ^ 0xFF]) + data[9:]


def _absurd_length(data):
    return struct.pack("<Q", 1 << 60) + data[8:]


def _few_bytes(data):
    return data[:5]


def _wrong_offsets(data):
    return data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1)


def _empty(data):
    return b""


def _unknown_dtype(data):
    return data.replace(b'"F32"', b'"X32"', 1)


def _wrong_dtype(data):
    return data.replace(b'"F32"', b'"F64"', 1)


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip_header, _absurd_length, _few_bytes, _empty, _wrong_offsets, _unknown_dtype, _wrong_dtype],
)
def test_damaged_file_is_named(model_folder, damage):
    data = _file(model_folder).read_bytes()
    damaged = damage(data)
    assert damaged != data
    _file(model_folder).write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        stored_tensors(model_folder)


def test_folder_without_config_or_tensors_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        stored_tensors(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        stored_tensors(tmp_path)


def test_missing_shard_is_named(tmp_path):
    save_dense_model(tmp_path / "sharded", "llama", max_shard_size="60KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the shard {shard.name}"):
        stored_tensors(tmp_path / "sharded")


# ------------------------------------------------------------------------------------------- which files
def _index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    save_dense_model(tmp_path / "sharded", "llama", max_shard_size="60KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize("has_shards", [True, False])
def test_stale_index_beside_a_single_file_is_refused(has_shards, sharded, tmp_path):
    """transformers reads model.safetensors, vLLM the index: they would run two models."""
    save_dense_model(tmp_path / "new", "llama", seed=5)
    (tmp_path / "new" / "model.safetensors").rename(sharded / "model.safetensors")
    if not has_shards:
        for shard in sharded.glob("model-*.safetensors"):
            shard.unlink()
    with pytest.raises(
        ValueError, match=r"holds two models: model\.safetensors, and model\.safetensors\.index\.json for"
    ):
        stored_tensors(sharded)


@pytest.mark.parametrize("name", ["model_old.safetensors", "a.safetensors", "model.fp16.safetensors"])
@pytest.mark.parametrize("share", ["all", "one"])
def test_second_file_with_the_same_tensors_is_refused(name, share, model_folder):
    tensors = load_file(_file(model_folder))
    if share == "one":
        tensors = {"x": torch.ones(1), "model.norm.weight": tensors["model.norm.weight"]}
    save_file(tensors, model_folder / name)
    with pytest.raises(ValueError, match=rf"twice: in model\.safetensors, which transformers loads, and in {name}"):
        stored_tensors(model_folder)


def test_shards_of_another_sharding_are_refused(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    save_file(load_file(shard), sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"twice: in .*, and in model-00001-of-00002\.safetensors; move"):
        stored_tensors(sharded)


def test_tensor_in_two_shards_is_refused(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match=f"twice, in {first.name} and {second.name}"):
        stored_tensors(sharded)


def test_index_of_another_sharding_is_refused(sharded):
    weight_map = json.loads((sharded / INDEX_NAME).read_text())["weight_map"]
    (name, file), (other_name, other_file) = next(
        (a, b) for a in weight_map.items() for b in weight_map.items() if a[1] != b[1]
    )
    _index(sharded, weight_map | {name: other_file, other_name: file})
    with pytest.raises(ValueError, match="index and files are of two models"):
        stored_tensors(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors"])
def test_index_that_leaves_the_folder_is_refused(name, model_folder):
    _file(model_folder).rename(model_folder / "x.safetensors")
    _index(model_folder, {"a": name})
    with pytest.raises(ValueError, match="is not a file of this folder"):
        stored_tensors(model_folder)


def test_files_that_transformers_does_not_read_are_not_read(model_folder):
    """A PEFT file, Mistral's consolidated file, other formats, and an index of the single file itself."""
    before = fingerprint(model_folder)
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2)}, model_folder / "adapter_model.safetensors")
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, model_folder / "consolidated.safetensors")
    (model_folder / "broken.safetensors").write_bytes(b"x")
    torch.save({"model.norm.weight": torch.ones(2)}, model_folder / "pytorch_model.bin")
    _index(model_folder, dict.fromkeys(load_file(_file(model_folder)), "model.safetensors"))
    assert fingerprint(model_folder) == before


def test_file_that_the_config_names_is_read(model_folder):
    before = fingerprint(model_folder)
    _file(model_folder).rename(model_folder / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"whether weights\.safetensors is the model"):
        stored_tensors(model_folder)
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "weights.safetensors"}))
    assert fingerprint(model_folder) == before
    (model_folder / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shard weights\.safetensors that its config\.json names"):
        stored_tensors(model_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "tf_model.h5"])
def test_other_formats_are_told_from_no_weights(name, model_folder):
    _file(model_folder).rename(model_folder / name)
    with pytest.raises(FileNotFoundError, match=rf"no \.safetensors file, only {name}: load .* and save_pretrained"):
        stored_tensors(model_folder)


def test_copied_tensors_are_the_same_bytes_under_new_names(tmp_path):
    tensors = {
        "flag": torch.ones(3, dtype=torch.uint8),
        "wide": torch.randn(5).double(),
        "half": torch.randn(3, 1).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors")
    copy_tensors({f"new.{name}": tensor for name, tensor in stored.items()}, tmp_path / "b.safetensors")
    copy = load_file(tmp_path / "b.safetensors")
    assert copy.keys() == {f"new.{name}" for name in tensors}
    assert all(torch.equal(copy[f"new.{name}"], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_damaged_index_is_named(model_folder, text):
    _file(model_folder).rename(model_folder / "model-1.safetensors")
    (model_folder / INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        stored_tensors(model_folder)


def test_tensors_are_readable_like_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
