"""Fingerprints, damaged files, and folders that appear whole or not at all."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tomoe_training.artifacts.files import (
    INDEX_NAME,
    fingerprint,
    link_or_copy,
    read_safetensors_header,
    stored_tensors,
    whole_folder,
    write_json_whole,
    write_tensors,
)

from tests.helpers.dense_models import save_dense_model
from tests.helpers.processes import start_python


@pytest.fixture
def model_folder(tmp_path):
    save_dense_model(tmp_path / "model", "llama")
    return tmp_path / "model"


def _file(folder):
    return folder / "model.safetensors"


def test_header_says_where_the_bytes_lie(model_folder):
    tensors = read_safetensors_header(_file(model_folder))
    expected = load_file(_file(model_folder))
    assert tensors.keys() == expected.keys()
    data = _file(model_folder).read_bytes()
    for name, stored in tensors.items():
        assert stored.shape == tuple(expected[name].shape)
        assert data[stored.start : stored.end] == expected[name].numpy().tobytes()


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


@pytest.mark.parametrize("damage", [_truncate, _flip_header, _absurd_length, _few_bytes, _wrong_offsets])
def test_damaged_file_is_named(model_folder, damage):
    data = _file(model_folder).read_bytes()
    damaged = damage(data)
    assert damaged != data
    _file(model_folder).write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model\.safetensors is (not a valid safetensors file|truncated at tensor)"):
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


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_damaged_index_is_named(model_folder, text):
    (model_folder / INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        stored_tensors(model_folder)


def test_folder_appears_only_when_the_block_is_over(tmp_path):
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_fails(tmp_path, error):
    def write():
        with whole_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = f"""
import pathlib, time
from tomoe_training.artifacts.files import whole_folder
with whole_folder(pathlib.Path({str(tmp_path / "out")!r})) as folder:
    (folder / "a").write_text("half")
    print(folder.name, flush=True)
    time.sleep(600)
"""
    dead, alive = start_python("-c", code), None
    try:
        left = dead.stdout.readline().strip()
        dead.kill()
        dead.communicate()
        assert (tmp_path / left).is_dir()
        alive = start_python("-c", code)
        written = alive.stdout.readline().strip()
        assert [p.name for p in tmp_path.iterdir()] == [written]  # the second writer removed what the first left
        with whole_folder(tmp_path / "out"):
            assert (tmp_path / written / "a").read_text() == "half"
    finally:
        for process in filter(None, (dead, alive)):
            process.kill()
            process.communicate()
    assert {p.name for p in tmp_path.iterdir()} == {"out", written}


def test_empty_folder_is_used_and_a_full_one_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ValueError, match="already exists; choose another --out"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "1"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="already exists"), whole_folder(tmp_path / "file"):
        pass


def test_json_is_replaced_whole(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        write_json_whole(file, {"a": object()})
    assert file.read_text() == "old"
    write_json_whole(file, {"a": [1]})
    assert json.loads(file.read_text()) == {"a": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_are_readable_like_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_go_to_the_file_itself_and_copies_where_links_cannot(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "a")  # as in the hub's cache
    link_or_copy(tmp_path / "link", tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == (tmp_path / "a").stat().st_ino
    assert not (tmp_path / "b").is_symlink()

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "link", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "1"
    assert (tmp_path / "c").stat().st_ino != (tmp_path / "a").stat().st_ino
