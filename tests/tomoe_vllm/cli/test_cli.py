"""The command line: one JSON line on stdout, and for misuse one line on stderr, exit code 2, nothing left."""

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.students import save_untrained_adapter
from tomoe_vllm import __version__

TINY = ("--width-multiple", 8, "--head-dim-multiple", 4)


@pytest.fixture
def base(dense_folder, tmp_path) -> Path:
    """A dense model that the test may damage."""
    shutil.copytree(dense_folder(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(adapter_folder, tmp_path) -> Path:
    """Its adapter, which the test may damage."""
    shutil.copytree(adapter_folder(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def export(run_cli, base, adapter, tmp_path):
    """``export(*more)``: tomoe export of base and adapter to tmp_path/out."""

    def run(*more, base=base, adapter=adapter, out=tmp_path / "out"):
        return run_cli("export", "--base", base, "--adapter", adapter, "--out", out, *TINY, *more)

    return run


def assert_one_line(result, *expected: str, code: int = 2) -> None:
    actual_code, out, err = result
    assert actual_code == code, err
    assert out == ""
    assert err.startswith("tomoe: ")
    assert err.count("\n") == 1, err
    for text in expected:
        assert text in err


def _flip_header(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"\xff" + data[9:])


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


# --------------------------------------------------------------------------------------- good input
def test_export_and_inspect_end_with_one_json_line(export, run_cli, tmp_path):
    code, out, _ = export("--active-ratio", 0.5)
    assert code == 0
    exported = json.loads(out)
    assert exported["checkpoint"] == str(tmp_path / "out")
    code, out, err = run_cli("inspect", tmp_path / "out")
    assert code == 0
    facts = json.loads(out)
    assert facts["active_ratio"] == exported["active_ratio"] <= 0.5
    assert "ToMoE checkpoint" in err
    code, out, err = run_cli("inspect", tmp_path / "adapter")
    assert (code, json.loads(out)["kind"]) == (0, "adapter")


def test_eval_ends_with_one_json_line(run_cli, base, text_file):
    code, out, _ = run_cli(
        "eval", "ppl", "--model", base, "--text", text_file, "--block-size", 32, "--max-blocks", 3
    )  # fmt: skip
    assert code == 0
    facts = json.loads(out)
    assert (facts["blocks"], facts["scored_tokens"], facts["backend"]) == (3, 93, "hf")


def test_version_and_help(run_cli):
    assert run_cli("--version")[:2] == (0, f"{__version__}\n")
    assert "vllm serve CHECKPOINT" in " ".join(run_cli("--help")[1].split())


def test_help_does_not_import_torch(run_cli):
    # In another process: this one has it.
    from tests.helpers.processes import python

    code = "import sys, tomoe_vllm.cli; assert 'torch' not in sys.modules and 'training' not in sys.modules"
    assert python("-c", code).returncode == 0


# --------------------------------------------------------------------------------------------- misuse
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["explode"], "No such command 'explode'"),
        (["export"], "Missing option '--"),
        (["export", "--bass", "x"], "--base"),
        (["inspect"], "Missing argument"),
        (["eval", "ppl", "--model", "x", "--text", "y", "--block-size", "many"], "--block-size"),
        (
            ["eval", "ppl", "--model", "x", "--text", "y", "--backend", "onnx"],
            "'onnx' is not one of 'hf', 'vllm'",
        ),
        (["eval", "ppl", "--model", "x", "--text", "/nowhere.txt"], "no such text file: /nowhere.txt"),
        (["inspect", "/nowhere"], "/nowhere is not a model folder: it has no config.json"),
        (["train", "--out", "x", "--config", "/nowhere.yaml"], "no such configuration file: /nowhere.yaml"),
        (["train", "--out", "x", "--set", "stpes=3"], "unknown setting 'stpes'; did you mean 'steps'?"),
        (["train", "--out", "x", "--set", "tau"], "--set takes key=value, got 'tau'"),
        (["train", "--out", "x", "--active-ratio", "1.5"], "active_ratio is 1.5; it must be at most 1"),
        (["train", "--out", "x", "--base", "/nowhere", "--data", "y"], "/nowhere is not a model folder"),
    ],
)
def test_misuse_is_one_line(arguments, expected, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run_cli(*arguments), expected)
    assert list(tmp_path.iterdir()) == []


def test_training_without_data_is_one_line(run_cli, base, tmp_path):
    assert_one_line(run_cli("train", "--base", base, "--out", tmp_path / "out"), "no training data")
    assert not (tmp_path / "out").exists()


def test_failure_that_is_not_misuse_exits_1(run_cli, monkeypatch, tmp_path):
    import tomoe_training.demo_model

    def fail(out):
        raise RuntimeError("pip could not\ndownload")

    monkeypatch.setattr(tomoe_training.demo_model, "write_demo_model", fail)
    assert_one_line(run_cli("demo-model", "--out", tmp_path / "x"), "tomoe: pip could not download", code=1)


# ------------------------------------------------------------------------- export: what cannot be exported
@pytest.fixture
def nothing_is_left(tmp_path):
    """Fails if the test leaves anything beside its input."""
    yield
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("p", ["0", "-0.5", "1.01", "nan"])
def test_p_out_of_range(p, export, nothing_is_left):
    assert_one_line(export("--active-ratio", p), "active_ratio is", "it must be in (0, 1]")


def test_p_too_small_for_the_model(export, nothing_is_left):
    assert_one_line(export("--active-ratio", "0.01"), "below the narrowest model", "--width-multiple")


@pytest.mark.parametrize(("option", "value"), [("--width-multiple", 0), ("--head-dim-multiple", -1)])
def test_impossible_multiples(option, value, export, nothing_is_left):
    assert_one_line(export(option, value), f"{option[2:].replace('-', '_')} is {value}; it must be at least 1")


def test_odd_head_dims(export, nothing_is_left):
    assert_one_line(export("--head-dim-multiple", 3, "--active-ratio", 0.5), "RoPE pairs")


@pytest.mark.parametrize(
    "fields", [{"seed": 1}, {"num_hidden_layers": 3}, {"head_dim": 32}, {"intermediate_size": 64}, {"family": "phi"}]
)
def test_wrong_base_model(fields, export, tmp_path, dense_folder):
    fields = dict(fields)
    other = dense_folder(fields.pop("family", "llama"), **fields)
    assert_one_line(export(base=other), "the adapter was trained on llama", "another model, or a damaged copy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [_truncate, _flip_header])
def test_damaged_base(damage, export, base, nothing_is_left):
    damage(base / "model.safetensors")
    assert_one_line(export(), "model.safetensors", "download or export it again")


@pytest.mark.parametrize("damage", [_truncate, _flip_header])
def test_damaged_adapter(damage, export, adapter, nothing_is_left):
    damage(adapter / "adapter.safetensors")
    assert_one_line(export(), "adapter.safetensors cannot be read")


def test_tensor_missing_in_the_adapter(export, run_cli, adapter, nothing_is_left):
    tensors = load_file(adapter / "adapter.safetensors")
    del tensors["layers.1.router.weight"]
    save_file(tensors, adapter / "adapter.safetensors")
    assert_one_line(export(), "lacks the tensor layers.1.router.weight")
    assert_one_line(run_cli("inspect", adapter), "lacks the tensor layers.1.router.weight")


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "no_such_model", "", None])
def test_unsupported_family_lists_the_supported(model_type, export, base, nothing_is_left):
    config = json.loads((base / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "rope_parameters"} | {"model_type": model_type}
    (base / "config.json").write_text(json.dumps(config))
    assert_one_line(export(), "llama, mistral, phi, qwen2, qwen3")


def test_damaged_base_config(export, base, nothing_is_left):
    (base / "config.json").write_text("{")
    assert_one_line(export(), "config.json is damaged")


def test_converted_model_is_not_a_base(export, tmp_path):
    assert export()[0] == 0
    assert_one_line(
        export(base=tmp_path / "out", out=tmp_path / "twice"), "already a ToMoE checkpoint; give the dense model"
    )


def test_existing_output_folder_is_kept(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    assert_one_line(export(), "already exists; choose another --out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_output_that_cannot_be_made(export, tmp_path):
    # Below a regular file: what a read-only folder is to a user, and holds for root too.
    (tmp_path / "file").write_text("")
    assert_one_line(export(out=tmp_path / "file" / "out"), str(tmp_path / "file"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 KB where mounting is allowed; else files may not grow past 4 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    is_mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    if is_mounted:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_nothing(export, small_disk):
    assert_one_line(export(out=small_disk / "out"), "disk")
    assert list(small_disk.iterdir()) == []


def test_full_disk_while_the_tomoe_tensors_are_written(export, small_disk, monkeypatch):
    from tomoe_training.artifacts import export as export_module

    monkeypatch.setattr(export_module, "link_or_copy", lambda source, target: os.symlink(source, target))
    if os.path.ismount(small_disk):
        (small_disk / "ballast").write_bytes(b"0" * 56_000)
    assert_one_line(export(out=small_disk / "out"), "model-tomoe.safetensors cannot be written")
    assert {p.name for p in small_disk.iterdir()} <= {"ballast"}


# --------------------------------------------------------------------------------- inspect and eval
@pytest.mark.parametrize(
    "name", ["mlp.expert_gate.signature", "self_attn.head_gate.value_up.weight", "self_attn.head_gate.query_key_dims"]
)
def test_tensor_missing_in_the_checkpoint(name, export, run_cli, tmp_path):
    assert export()[0] == 0
    file = tmp_path / "out" / "model-tomoe.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.{name}"]
    save_file(tensors, file)
    assert_one_line(run_cli("inspect", tmp_path / "out"), f"lacks the tensor model.layers.1.{name} of its config.json")


@pytest.mark.parametrize("damage", [_truncate, _flip_header, os.unlink])
def test_damaged_checkpoint(damage, export, run_cli, tmp_path):
    assert export()[0] == 0
    damage(tmp_path / "out" / "model-tomoe.safetensors")
    assert_one_line(run_cli("inspect", tmp_path / "out"), "model-tomoe.safetensors")


def test_dense_model_is_nothing_to_inspect(run_cli, base):
    assert_one_line(run_cli("inspect", base), "is a dense llama model, not a ToMoE checkpoint or adapter")


@pytest.mark.parametrize("text", ["{", '{"model_type": "no_such_model"}', "{}", "[]"])
def test_damaged_config_of_a_checkpoint(text, export, run_cli, tmp_path):
    assert export()[0] == 0
    (tmp_path / "out" / "config.json").write_text(text)
    assert_one_line(run_cli("inspect", tmp_path / "out"), "")


def test_text_shorter_than_one_block(run_cli, base, tmp_path):
    (tmp_path / "short.txt").write_text("w0 w1 w2")
    assert_one_line(
        run_cli("eval", "ppl", "--model", base, "--text", tmp_path / "short.txt"),
        "the text has 4 tokens, less than one block of 1024; lower --block-size",
    )


def test_sharded_export_of_every_kind_is_inspectable(run_cli, tmp_path, dense_folder):
    for vo_mode in ("static", "none"):
        save_untrained_adapter(tmp_path / vo_mode, dense_folder("phi"), vo_mode=vo_mode)
        out = tmp_path / f"{vo_mode}-out"
        arguments = ("export", "--base", dense_folder("phi"), "--adapter", tmp_path / vo_mode, "--out", out, *TINY)
        assert run_cli(*arguments)[0] == 0
        assert json.loads(run_cli("inspect", out)[1])["vo_mode"] == vo_mode
