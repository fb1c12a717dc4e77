"""What cannot be served is refused in one line, before the port opens and before vLLM is imported."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tomoe_serving.server.listen import bind
from tomoe_serving.server.memory import free_memory, require_memory


@pytest.fixture
def broken(served_model, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(served_model, tmp_path / "model")


def _refusal(run_cli, *arguments) -> str:
    code, out, err = run_cli("serve", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    return err


def test_a_path_that_is_no_folder(run_cli):
    assert "not a model folder" in _refusal(run_cli, "/nowhere/model")


def test_a_dense_model(run_cli, dense_folder):
    assert "not a ToMoE checkpoint" in _refusal(run_cli, dense_folder())


def test_an_adapter(run_cli, adapter_folder):
    assert "export it first" in _refusal(run_cli, adapter_folder())


def test_a_truncated_file(run_cli, broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "truncated" in _refusal(run_cli, broken)


def test_a_file_that_is_none(run_cli, broken):
    (broken / "model.safetensors").write_bytes(b"\x00" * 50)
    assert "not a valid safetensors file" in _refusal(run_cli, broken)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.expert_gate.router.weight"])
def test_a_missing_tensor(run_cli, broken, name):
    file = broken / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    assert f"lacks the tensor {name}" in _refusal(run_cli, broken)


def test_a_tensor_of_another_shape(run_cli, broken):
    config = broken / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"vocab_size": fields["vocab_size"] + 1}))
    assert "its config says" in _refusal(run_cli, broken)


def test_an_unknown_flag(run_cli, served_model):
    assert "did you mean --port?" in _refusal(run_cli, served_model, "--prot", 1)


def test_help_is_the_servers_own(run_cli):
    code, out, _ = run_cli("serve", "--help")
    assert code == 0
    assert "--tpot-slo-ms" in out


def test_weights_larger_than_memory():
    with pytest.raises(ValueError, match=r"needs 4\.0 GiB .* 1\.0 GiB are free"):
        require_memory(Path("model"), 4 << 30, 1 << 30)
    require_memory(Path("model"), 1 << 30, 1 << 30)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "3000", "memory.current": "1000"}, 2000),
        ({"memory/memory.limit_in_bytes": "500", "memory/memory.usage_in_bytes": "100"}, 400),
    ],
)
def test_a_control_group_limits_memory(tmp_path, files, free):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == free


def test_without_a_limit_the_machine_counts(tmp_path):
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(tmp_path) > 1 << 20


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="cannot be bound"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_a_bound_port_is_not_open_yet():
    with bind("127.0.0.1", 0) as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname(), timeout=5)
