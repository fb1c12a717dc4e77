"""The training loop on a tiny model: the loss falls, and every setting has an effect."""

import json
from datetime import timedelta

import pytest
import torch
from tomoe_training import trainer
from tomoe_training.artifacts.adapter import ADAPTER_CONFIG, ADAPTER_TENSORS, Adapter
from tomoe_training.artifacts.export import export_checkpoint, plan_widths
from tomoe_training.artifacts.inspection import inspect
from tomoe_training.artifacts.safetensors_io import fingerprint
from tomoe_training.config import load_run_config
from tomoe_training.trainer import train
from transformers import AutoConfig

from tests.helpers.dense_models import random_text
from tests.helpers.pretended_gpu import pretended_gpu, record_synchronizations
from tests.helpers.runs import SETTINGS, assert_identical, assignments, largest_difference, metrics, tensors
from tomoe_vllm.hf.configuration_tomoe import block_shape


@pytest.fixture(scope="module")
def plain_run(dense_folder, text_file, tmp_path_factory):
    """Settings of a short run, and its adapter: what one changed setting is compared with."""
    fields = {"steps": 3, "widths_every": 0}
    out = tmp_path_factory.mktemp("plain") / "out"
    settings = SETTINGS | {"base": str(dense_folder()), "data": [str(text_file)]} | fields
    train(load_run_config(None, settings, []), out)
    return fields, out


def test_training_reduces_the_loss_and_ends_in_an_exportable_adapter(config, dense_folder, tmp_path):
    summary = train(config(steps=60, warm_start_tokens=0, learning_rate=1e-2), tmp_path / "out")
    task = [row["task"] for row in metrics(tmp_path / "out")]
    assert len(task) == 60
    assert sum(task[-10:]) < 0.8 * sum(task[:10])
    assert summary["resumed_from"] == 0
    assert summary["tokens"] == 60 * 2 * 32
    adapter = Adapter.load(tmp_path / "out")
    assert adapter.config.base_model_hash == fingerprint(dense_folder())
    assert not (tmp_path / "out" / "run" / "checkpoint.pt").exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {ADAPTER_CONFIG, ADAPTER_TENSORS, "run"}
    assert json.loads((tmp_path / "out" / "run" / "provenance.json").read_text())["versions"]["torch"]
    export_checkpoint(dense_folder(), tmp_path / "out", tmp_path / "model", width_multiple=8, head_dim_multiple=4)
    assert inspect(tmp_path / "model")["active_ratio"] == pytest.approx(summary["active_ratio"])


def test_metrics_have_all_terms_and_stay_within_the_budget(config, tmp_path):
    train(config(), tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["active_ratio"] <= 0.6
        assert 0 < row["union"] <= 1
        assert row["loss"] == pytest.approx(row["task"] + 2 * row["r_u"] + row["r_l"], abs=1e-4)
        assert row["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"vo_mode": "static"},
        {"vo_mode": "none", "active_ratio": 0.7},
        {"budget": "penalty", "mask_noise": 1.0, "router_noise": 1.0, "warm_start_tokens": 0},  # the paper
        {"budget": "penalty", "mask_noise": 1.0, "vo_mode": "static"},
        {"objective": "lm"},
        {"local_embeddings": True},
        {"train_offsets": False},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "objective": "lm", "adapter_dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5},
        {"active_ratio": 1.0},
        {"num_experts": 1},
        {"num_experts": 9},
    ],
    ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()),
)
def test_every_mode_trains_and_exports_within_the_budget(fields, config, dense_folder, tmp_path):
    run = config(**({"steps": 3} | fields))
    train(run, tmp_path / "out")
    assert all(torch.isfinite(t).all() for t in tensors(tmp_path / "out").values())
    export_checkpoint(dense_folder(), tmp_path / "out", tmp_path / "model", width_multiple=8, head_dim_multiple=4)
    assert inspect(tmp_path / "model")["active_ratio"] <= run.active_ratio


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"budget": "penalty", "mask_noise": 1.0, "router_noise": 1.0},  # the paper
        {"family": "phi", "head_dim_multiple": 1, "micro_batch_size": 1},  # pairs and single dims
    ],
    ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()) or "default",
)
def test_step_does_not_wait_for_the_gpu(fields, config, dense_folder, tmp_path, monkeypatch):
    """The host may wait when the terms are read: every ``log_every`` steps, and before a file is written."""
    step, in_steps = trainer._Run._step, []

    def counted(self, *arguments):
        before = len(waits)
        step(self, *arguments)
        in_steps.extend(waits.items[before:])

    monkeypatch.setattr(trainer._Run, "_step", counted)
    monkeypatch.setattr(trainer._Run, "_initialize_student", lambda self: None)  # it waits, once in a run
    base = str(dense_folder(fields.get("family", "llama")))
    settings = {k: v for k, v in fields.items() if k != "family"} | {"base": base, "widths_every": 0, "steps": 3}
    with pretended_gpu(), record_synchronizations() as waits:
        train(config(log_every=2, checkpoint_every=100, **settings), tmp_path / "out")
    assert in_steps == [], str(waits)
    assert sum("terms.py" in wait.place for wait in waits.items) == 2  # after steps 2 and 3


@pytest.mark.parametrize("family", ["mistral", "qwen3", "phi"])
def test_other_families_train(family, config, dense_folder, tmp_path):
    train(config(base=str(dense_folder(family)), steps=2), tmp_path / "out")
    assert Adapter.load(tmp_path / "out").config.base_model_type == family


def test_a_different_seed_gives_another_adapter_and_the_same_seed_the_same(config, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(seed=seed, mask_noise=1.0, router_noise=1.0), tmp_path / name)
    assert_identical(tmp_path / "a", tmp_path / "b")
    assert largest_difference(tmp_path / "a", tmp_path / "c") > 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "lm"},
        {"beta": 0.0},  # no R_U
        {"gamma": 0.0},
        {"vo_mode": "none", "active_ratio": 0.7},  # no value routing
        {"vo_mode": "static"},
        {"local_embeddings": True},
        {"tau": 0.3},
        {"num_experts": 3},
        {"train_offsets": False},
        {"mask_noise": 1.0},
        {"router_noise": 1.0},
        {"budget": "penalty"},
        {"warm_start_tokens": 0},
        {"weight_decay": 0.5},
        {"offset_learning_rate": 0.1},
        {"max_grad_norm": 1e-6},
        {"schedule": "linear"},
        {"warmup_steps": 2},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()),
)
def test_every_switch_changes_what_is_trained(change, config, plain_run, tmp_path):
    train(config(**plain_run[0] | change), tmp_path / "out")
    mine, theirs = tensors(tmp_path / "out"), tensors(plain_run[1])
    same_shapes = {n for n, t in mine.items() if n in theirs and t.shape == theirs[n].shape}
    assert same_shapes != mine.keys() or any(not torch.allclose(mine[n], theirs[n], rtol=1e-5) for n in same_shapes)


def test_alpha_has_an_effect_only_with_the_penalty(config, tmp_path):
    fields = {"steps": 2, "warm_start_tokens": 0}
    for budget in ("exact", "penalty"):
        for alpha in (16.0, 1.0):
            train(config(**fields, budget=budget, alpha=alpha), tmp_path / f"{budget}{alpha}")
    assert_identical(tmp_path / "exact16.0", tmp_path / "exact1.0")
    assert largest_difference(tmp_path / "penalty16.0", tmp_path / "penalty1.0") > 1e-4


def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    train(config(steps=3), tmp_path / "plain")
    train(config(steps=3, gradient_checkpointing=True), tmp_path / "checkpointed")
    assert largest_difference(tmp_path / "checkpointed", tmp_path / "plain") < 1e-5


def test_accumulated_gradients_are_those_of_the_whole_batch(config, tmp_path):
    # R_L is a product of two means over the forward pass's tokens, so it stays out of this.
    fields = {"batch_size": 4, "gamma": 0.0, "steps": 3, "mask_noise": 1.0, "router_noise": 1.0}
    train(config(**fields), tmp_path / "whole")
    train(config(**fields, micro_batch_size=1), tmp_path / "parts")
    assert largest_difference(tmp_path / "parts", tmp_path / "whole") < 1e-5
    losses = [[row["task"] for row in metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_tolerance_catches_one_sequence_more(config, tmp_path):
    fields = {"gamma": 0.0, "vo_mode": "static", "steps": 3}
    train(config(**fields, batch_size=4), tmp_path / "four")
    train(config(**fields, batch_size=3), tmp_path / "three")
    assert largest_difference(tmp_path / "three", tmp_path / "four") > 1e-3


def test_run_starts_from_the_masks_of_an_adapter(config, adapter_folder, tmp_path):
    start = Adapter.load(adapter_folder())
    train(config(init_adapter=str(adapter_folder()), steps=1, learning_rate=1e-12, weight_decay=0.0), tmp_path / "out")
    for mine, theirs in zip(Adapter.load(tmp_path / "out").layers, start.layers, strict=True):
        assert torch.allclose(mine.logits.experts, theirs.logits.experts, atol=1e-4)
        assert torch.allclose(mine.logits.query_key, theirs.logits.query_key, atol=1e-4)
        assert torch.allclose(mine.router, theirs.router)
        assert torch.allclose(mine.value_bias, theirs.value_bias, atol=1e-5)


def test_sampled_text_is_stored_for_resuming(config, tmp_path):
    train(config(data=["self"], self_tokens=2000, steps=2), tmp_path / "out")
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "run" / "self.jsonl").read_text().splitlines()]
    assert sum(len(text.split()) for text in texts) > 1000


def test_sampled_text_does_not_depend_on_gradient_checkpointing(config, tmp_path):
    """Checkpointed layers drop the KV cache: each token would be sampled without the ones before it."""
    fields = {"data": ["self"], "self_tokens": 600, "steps": 1, "warm_start_tokens": 0}
    for name, is_on in (("plain", False), ("checkpointed", True)):
        train(config(**fields, gradient_checkpointing=is_on), tmp_path / name)
    plain, checkpointed = ((tmp_path / n / "run" / "self.jsonl").read_text() for n in ("plain", "checkpointed"))
    assert checkpointed == plain


def test_processes_wait_as_long_as_the_setting_says(config, tmp_path, monkeypatch):
    """NCCL's default of ten minutes is less than tokenizing a large corpus in the first process takes."""

    class ReachedError(Exception):
        pass

    def start(kwargs_handlers, **_):
        raise ReachedError([handler.timeout for handler in kwargs_handlers if hasattr(handler, "timeout")])

    monkeypatch.setattr(trainer, "Accelerator", start)
    for fields, minutes in (({}, 240), ({"process_timeout_minutes": 7}, 7)):
        with pytest.raises(ReachedError) as reached:
            train(config(**fields), tmp_path / "out")
        assert reached.value.args == ([timedelta(minutes=minutes)],)


def test_command_line_trains_and_ends_with_one_json_line(config, run_cli, tmp_path):
    (tmp_path / "more.txt").write_text(random_text(500, seed=1))
    data = ["--data", tmp_path / "more.txt"]
    code, out, err = run_cli("train", "--out", tmp_path / "out", *assignments(config(), steps=2), *data)
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    assert json.loads(out)["data"] == ["text.txt", "more.txt"]
    assert "step 2/2: loss" in err


def test_tensorboard_files_are_written(config, tmp_path):
    train(config(steps=1, tensorboard=True), tmp_path / "out")
    assert list((tmp_path / "out" / "run" / "tensorboard").glob("events.*"))


def test_initial_widths_are_exported_unless_updated(config, tmp_path):
    def widths(name, **fields):
        run = config(learning_rate=0.05, **fields)
        train(run, tmp_path / name)
        adapter = Adapter.load(tmp_path / name)
        shape = block_shape(AutoConfig.from_pretrained(run.base))
        plan = plan_widths(adapter, shape, None, run.width_multiple, run.head_dim_multiple)
        return plan.experts, plan.qk_dims

    start = widths("one-step", steps=1, widths_every=0)
    assert widths("frozen", steps=12, widths_every=0) == start
    assert widths("updated", steps=12, widths_every=2) != start
