"""Runs that the trainer refuses: one line, and existing files are kept."""

from types import SimpleNamespace

import pytest
import torch
from tomoe_training import trainer
from tomoe_training.artifacts.adapter import ADAPTER_CONFIG, ADAPTER_TENSORS
from tomoe_training.trainer import train

from tests.helpers.dense_models import save_dense_model
from tests.helpers.runs import interrupt


@pytest.mark.parametrize("size", [0, 5, 1000, -100])
def test_truncated_training_checkpoint_is_one_clear_error(size, config, tmp_path):
    interrupt(config(), tmp_path / "out")
    file = tmp_path / "out" / "run" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged \(.*\); remove it to start this run again"):
        train(config(), tmp_path / "out")
    assert file.is_file()  # nothing is lost


def test_training_checkpoint_of_an_older_version_is_refused_and_kept(config, tmp_path):
    interrupt(config(), tmp_path / "out")
    file = tmp_path / "out" / "run" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    del state["version"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"checkpoint\.pt has training state version 1, this tomoe resumes version 2"):
        train(config(), tmp_path / "out")
    assert file.is_file()


def test_output_of_another_run_is_refused_and_kept(config, tmp_path):
    train(config(steps=2), tmp_path / "out")
    before = (tmp_path / "out" / ADAPTER_TENSORS).read_bytes()
    with pytest.raises(ValueError, match=r"belongs to another run \(seed: 0 there, 1 here\); choose another --out"):
        train(config(steps=2, seed=1), tmp_path / "out")
    assert (tmp_path / "out" / ADAPTER_TENSORS).read_bytes() == before


def test_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a training run; choose another --out"):
        train(config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("cause", ["learning_rate", "weight"])
def test_non_finite_loss_error_has_the_step_and_the_terms(cause, config, tmp_path):
    fields = {"learning_rate": 1e30} if cause == "learning_rate" else {}
    if cause == "weight":
        folder = tmp_path / "base"
        model = save_dense_model(folder, "llama")
        model.lm_head.weight.data[5, 5] = float("inf")
        model.save_pretrained(folder)
        fields = {"base": str(folder), "warm_start_tokens": 0}
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+: loss (nan|inf), task (nan|inf), .*r_u"):
        train(config(**fields), tmp_path / "out")
    assert not (tmp_path / "out" / ADAPTER_CONFIG).exists()


def test_state_with_noise_of_another_device_is_refused_and_kept(config, tmp_path):
    """A GPU draws other numbers than the CPU: the run would mix two noises."""
    noisy = config(mask_noise=1.0)
    interrupt(noisy, tmp_path / "out")
    file = tmp_path / "out" / "run" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    assert state["noise_device"] == "cpu"
    torch.save(state | {"noise_device": "cuda"}, file)
    with pytest.raises(ValueError, match=r"noise was drawn on 'cuda', and 'cpu' draws other numbers: resume it there"):
        train(noisy, tmp_path / "out")
    del state["noise_device"]  # as older versions wrote it, which drew all noise on the CPU
    torch.save(state, file)
    assert train(noisy, tmp_path / "out")["resumed_from"] == 2


def test_state_with_noise_of_another_gpu_model_is_refused_and_kept(config, tmp_path, monkeypatch):
    """``torch.rand`` depends on the number of multiprocessors."""
    noisy = config(mask_noise=1.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {"cuda:1": "NVIDIA H200"}[str(device)])
    run = SimpleNamespace(config=noisy, accelerator=SimpleNamespace(device=torch.device("cuda", 1)))
    name = trainer._Run._noise_device(run)
    assert name == "NVIDIA H200"
    monkeypatch.setattr(trainer._Run, "_noise_device", lambda self: name)
    interrupt(noisy, tmp_path / "out")
    file = tmp_path / "out" / "run" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"noise_device": "NVIDIA A100-SXM4-80GB"}, file)
    with pytest.raises(ValueError, match=r"drawn on 'NVIDIA A100-SXM4-80GB', and 'NVIDIA H200' draws other numbers"):
        train(noisy, tmp_path / "out")
    torch.save(state, file)
    assert train(noisy, tmp_path / "out")["resumed_from"] == 2


def test_run_without_noise_may_be_resumed_on_another_device(config, tmp_path):
    interrupt(config(), tmp_path / "out")
    file = tmp_path / "out" / "run" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    assert state["noise_device"] is None
    torch.save(state, file)
    assert train(config(), tmp_path / "out")["resumed_from"] == 2


@pytest.mark.parametrize("field", ["checkpoint_every", "steps"])
def test_non_finite_step_between_two_log_steps_reaches_no_file(field, config, tmp_path):
    """Terms are read every ``log_every`` steps, and before anything is written."""
    fields = {"learning_rate": 1e30, "log_every": 100, "checkpoint_every": 100, "widths_every": 0} | {field: 4}
    with pytest.raises(FloatingPointError, match="not finite at step 2: loss"):
        train(config(**fields), tmp_path / "out")
    assert not (tmp_path / "out" / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "out" / ADAPTER_CONFIG).exists()


@pytest.mark.parametrize("fields", [{"checkpoint_every": 2}, {"steps": 2}], ids=["checkpoint", "adapter"])
def test_weights_that_overflow_in_a_finite_step_reach_no_file(fields, config, tmp_path, monkeypatch):
    step = trainer._Run._step

    def overflow(self, model, optimizer, noise, number):
        step(self, model, optimizer, noise, number)
        if number == 1:
            self.student.expert_gates[0].offset.data[0, 0] = float("inf")

    monkeypatch.setattr(trainer._Run, "_step", overflow)
    with pytest.raises(FloatingPointError, match="the weights or the optimizer's state are not finite after step 2"):
        train(config(widths_every=0, log_every=1, **fields), tmp_path / "out")
    assert not (tmp_path / "out" / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "out" / ADAPTER_CONFIG).exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": []}, "no training data"),
        ({"data": ["/nowhere.txt"]}, "no such data file: /nowhere.txt"),
        ({"base": "/nowhere"}, "/nowhere is not a model folder"),
        ({"sequence_length": 100_000}, "shorter than one block of 100000 tokens"),
        (
            {"micro_batch_size": 3, "batch_size": 4},
            "batch_size 4 does not divide into micro-batches of 3 on 1 processes; set batch_size",
        ),
        ({"init_adapter": "/nowhere"}, "/nowhere is not an adapter"),
    ],
)
def test_bad_input_is_one_clear_error(fields, message, config, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config(**fields), tmp_path / "out")


def test_refused_run_can_be_corrected_in_the_same_folder(config, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(config(data=["/nowhere.txt"]), tmp_path / "out")
    train(config(steps=1), tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), [("num_experts", 5), ("vo_mode", "static"), ("value_router_dim", 8)])
def test_adapter_of_another_shape_cannot_be_the_start(name, value, config, adapter_folder, tmp_path):
    with pytest.raises(ValueError, match=f"has {name} .*, this run {value!r}; set {name} to match"):
        train(config(init_adapter=str(adapter_folder()), **{name: value}), tmp_path / "out")


def test_adapter_of_another_base_cannot_be_the_start(config, adapter_folder, dense_folder, tmp_path):
    other = str(dense_folder("llama", seed=4))
    with pytest.raises(ValueError, match="the adapter was trained on llama"):
        train(config(base=other, init_adapter=str(adapter_folder())), tmp_path / "out")


def test_tokenizer_of_another_model_is_an_error(config, tmp_path):
    save_dense_model(tmp_path / "base", "llama", vocab_size=50)
    with pytest.raises(ValueError, match="has 93 tokens, the model 50: they do not belong together"):
        train(config(base=str(tmp_path / "base")), tmp_path / "out")
