"""A checkpoint that cannot be served is refused in one line, before the port opens and before vLLM is imported."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def broken(served_model, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(served_model, tmp_path / "model")


def _refusal(run_cli, *arguments) -> str:
    code, out, err = run_cli("serve", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    return err


def test_missing_folder_is_refused(run_cli):
    assert "not a model folder" in _refusal(run_cli, "/nowhere/model")


def test_dense_model_is_refused(run_cli, dense_folder):
    assert "not a ToMoE checkpoint" in _refusal(run_cli, dense_folder())


def test_adapter_is_refused(run_cli, adapter_folder):
    assert "export it first" in _refusal(run_cli, adapter_folder())


def test_truncated_file_is_refused(run_cli, broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "truncated" in _refusal(run_cli, broken)


def test_invalid_file_is_refused(run_cli, broken):
    (broken / "model.safetensors").write_bytes(b"\x00" * 50)
    assert "not a valid safetensors file" in _refusal(run_cli, broken)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.expert_gate.router.weight"])
def test_missing_tensor_is_refused(run_cli, broken, name):
    file = broken / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    assert f"lacks the tensor {name}" in _refusal(run_cli, broken)


def test_tensor_of_the_wrong_shape_is_refused(run_cli, broken):
    config = broken / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"vocab_size": fields["vocab_size"] + 1}))
    assert "its config.json says" in _refusal(run_cli, broken)


def test_unknown_flag_is_refused(run_cli, served_model):
    assert "--port" in _refusal(run_cli, served_model, "--prot", 1)


def test_help_lists_the_settings(run_cli):
    code, out, _ = run_cli("serve", "--help")
    assert code == 0
    assert "--tpot-slo-ms" in out
