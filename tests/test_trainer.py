"""The training loop on a tiny model: it learns, it resumes to the same bits, and it refuses what is wrong."""

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.helpers.dense_models import random_text, save_dense_model
from tests.helpers.processes import environment, python, start_python
from tomoe_vllm.hf.configuration_tomoe import block_shape
from training.adapter import Adapter
from training.checkpoint import ADAPTER_CONFIG, ADAPTER_TENSORS, fingerprint
from training.config import load_run_config
from training.export import export_checkpoint, plan_widths
from training.inspection import inspect
from training.trainer import train

SETTINGS = {
    "active_ratio": 0.6,
    "num_experts": 4,
    "value_router_dim": 16,
    "width_multiple": 8,
    "head_dim_multiple": 4,
    "sequence_length": 32,
    "batch_size": 2,
    "steps": 6,
    "warm_start_tokens": 256,
    "widths_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "dtype": "float32",
    "tensorboard": False,
}


@pytest.fixture
def config(dense_folder, text_file):
    """``config(steps=3)``: a run on the tiny llama and its text."""

    def make(**fields):
        settings = SETTINGS | {"base": str(dense_folder()), "data": [str(text_file)]}
        return load_run_config(None, settings | fields, [])

    return make


@pytest.fixture(scope="module")
def plain_run(dense_folder, text_file, tmp_path_factory):
    """Settings of a short run, and its adapter: what one changed setting is compared with."""
    fields = {"steps": 3, "widths_every": 0}
    out = tmp_path_factory.mktemp("plain") / "out"
    settings = SETTINGS | {"base": str(dense_folder()), "data": [str(text_file)]} | fields
    train(load_run_config(None, settings, []), out)
    return fields, out


def _assignments(config_, **fields):
    """The same run as command-line arguments."""
    settings = {k: getattr(config_, k) for k in SETTINGS} | fields
    sets = [part for k, v in settings.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    return ["--base", config_.base, "--data", *config_.data, *sets]


def _metrics(out):
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


def _tensors(out):
    return load_file(out / ADAPTER_TENSORS)


def _assert_identical(out, other):
    mine, theirs = _tensors(out), _tensors(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def _largest_difference(out, other):
    """Largest relative RMS difference of any tensor of two adapters."""
    mine, theirs = _tensors(out), _tensors(other)
    assert mine.keys() == theirs.keys()
    return max(((mine[n] - t).square().mean() / t.square().mean()).sqrt().item() for n, t in theirs.items())


# ------------------------------------------------------------------------------------------- it trains
def test_training_reduces_the_loss_and_ends_in_an_exportable_adapter(config, dense_folder, tmp_path):
    summary = train(config(steps=60, warm_start_tokens=0, learning_rate=1e-2), tmp_path / "out")
    task = [row["task"] for row in _metrics(tmp_path / "out")]
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


def test_metrics_say_what_was_paid_and_never_exceed_the_budget(config, tmp_path):
    train(config(), tmp_path / "out")
    rows = _metrics(tmp_path / "out")
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
    assert all(torch.isfinite(t).all() for t in _tensors(tmp_path / "out").values())
    export_checkpoint(dense_folder(), tmp_path / "out", tmp_path / "model", width_multiple=8, head_dim_multiple=4)
    assert inspect(tmp_path / "model")["active_ratio"] <= run.active_ratio


@pytest.mark.parametrize("family", ["mistral", "qwen3", "phi"])
def test_other_families_train(family, config, dense_folder, tmp_path):
    train(config(base=str(dense_folder(family)), steps=2), tmp_path / "out")
    assert Adapter.load(tmp_path / "out").config.base_model_type == family


def test_a_different_seed_gives_another_adapter_and_the_same_seed_the_same(config, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(seed=seed, mask_noise=1.0, router_noise=1.0), tmp_path / name)
    _assert_identical(tmp_path / "a", tmp_path / "b")
    assert _largest_difference(tmp_path / "a", tmp_path / "c") > 0.01


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
    mine, theirs = _tensors(tmp_path / "out"), _tensors(plain_run[1])
    same_shapes = {n for n, t in mine.items() if n in theirs and t.shape == theirs[n].shape}
    assert same_shapes != mine.keys() or any(not torch.allclose(mine[n], theirs[n], rtol=1e-5) for n in same_shapes)


def test_penalty_weighs_only_where_the_budget_is_a_penalty(config, tmp_path):
    fields = {"steps": 2, "warm_start_tokens": 0}
    for budget in ("exact", "penalty"):
        for alpha in (16.0, 1.0):
            train(config(**fields, budget=budget, alpha=alpha), tmp_path / f"{budget}{alpha}")
    _assert_identical(tmp_path / "exact16.0", tmp_path / "exact1.0")
    assert _largest_difference(tmp_path / "penalty16.0", tmp_path / "penalty1.0") > 1e-4


def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    train(config(steps=3), tmp_path / "plain")
    train(config(steps=3, gradient_checkpointing=True), tmp_path / "checkpointed")
    assert _largest_difference(tmp_path / "checkpointed", tmp_path / "plain") < 1e-5


def test_accumulated_gradients_are_those_of_the_whole_batch(config, tmp_path):
    # R_L is a product of two means over the forward pass's tokens, so it stays out of this.
    fields = {"batch_size": 4, "gamma": 0.0, "steps": 3, "mask_noise": 1.0, "router_noise": 1.0}
    train(config(**fields), tmp_path / "whole")
    train(config(**fields, micro_batch_size=1), tmp_path / "parts")
    assert _largest_difference(tmp_path / "parts", tmp_path / "whole") < 1e-5
    losses = [[row["task"] for row in _metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_tolerance_catches_one_sequence_more(config, tmp_path):
    fields = {"gamma": 0.0, "vo_mode": "static", "steps": 3}
    train(config(**fields, batch_size=4), tmp_path / "four")
    train(config(**fields, batch_size=3), tmp_path / "three")
    assert _largest_difference(tmp_path / "three", tmp_path / "four") > 1e-3


def test_run_starts_from_the_masks_of_an_adapter(config, adapter_folder, tmp_path):
    start = Adapter.load(adapter_folder())
    train(config(init_adapter=str(adapter_folder()), steps=1, learning_rate=1e-12, weight_decay=0.0), tmp_path / "out")
    for mine, theirs in zip(Adapter.load(tmp_path / "out").layers, start.layers, strict=True):
        assert torch.allclose(mine.logits.experts, theirs.logits.experts, atol=1e-4)
        assert torch.allclose(mine.logits.query_key, theirs.logits.query_key, atol=1e-4)
        assert torch.allclose(mine.router, theirs.router)
        assert torch.allclose(mine.value_bias, theirs.value_bias, atol=1e-5)


def test_text_of_the_model_itself_is_kept_for_the_resume(config, tmp_path):
    train(config(data=["self"], self_tokens=2000, steps=2), tmp_path / "out")
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "run" / "self.jsonl").read_text().splitlines()]
    assert sum(len(text.split()) for text in texts) > 1000


# ------------------------------------------------------------------------------------------- it resumes
def _kill_at(process, out, step):
    """SIGKILL the process as soon as its metrics reach ``step``."""
    file = out / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if file.is_file() and file.read_text().count("\n") >= step:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError("the run never reached the step")


def test_killed_run_ends_with_the_same_bits(config, tmp_path):
    fields = {
        "steps": 40,
        "checkpoint_every": 5,
        "mask_noise": 1.0,
        "router_noise": 1.0,
        "schedule": "linear",
        "widths_every": 7,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["-m", "tomoe_vllm.cli", "train", "--out", killed, *_assignments(config(), **fields)]
    process = start_python(*command)
    _kill_at(process, killed, 12)
    assert not (killed / ADAPTER_CONFIG).exists()
    first = torch.load(killed / "run" / "checkpoint.pt", weights_only=False)["step"]
    assert first >= 10
    assert first % 5 == 0
    assert train(config(**fields), killed)["resumed_from"] == first
    train(config(**fields), whole)
    _assert_identical(killed, whole)
    assert [row["step"] for row in _metrics(killed)] == list(range(1, 41))
    for mine, theirs in zip(_metrics(killed), _metrics(whole), strict=True):
        assert mine["loss"] == theirs["loss"]
    # A third start finds the run finished.
    before = (killed / ADAPTER_TENSORS).stat().st_mtime_ns
    assert train(config(**fields), killed)["resumed_from"] == 40
    assert (killed / ADAPTER_TENSORS).stat().st_mtime_ns == before


@pytest.mark.parametrize("shard_base", [False, True], ids=["copies", "sharded"])
def test_two_processes_train_the_adapter_of_one(shard_base, config, tmp_path):
    fields = {"mask_noise": 1.0, "router_noise": 1.0, "steps": 5}
    train(config(**fields), tmp_path / "one")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", _free_port()]
    sets = _assignments(config(), **fields, shard_base=shard_base)
    result = python(
        *launch, "-m", "tomoe_vllm.cli", "train", "--out", tmp_path / "two", *sets,
        env=environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert _largest_difference(tmp_path / "two", tmp_path / "one") < 1e-5
    terms = [[row[k] for row in _metrics(tmp_path / n) for k in ("task", "r_l", "r_u")] for n in ("one", "two")]
    assert terms[1] == pytest.approx(terms[0], abs=2e-5)


def _free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------------- it refuses
def _interrupted(config_, out):
    """A run folder with a checkpoint and no adapter, as a kill leaves it."""

    class StoppedError(Exception):
        pass

    import training.trainer

    step = training.trainer._Run._step

    def stop(self, model, optimizer, noise, number):
        if number == 2:
            raise StoppedError
        return step(self, model, optimizer, noise, number)

    training.trainer._Run._step = stop
    try:
        with pytest.raises(StoppedError):
            train(config_, out)
    finally:
        training.trainer._Run._step = step
    assert (out / "run" / "checkpoint.pt").is_file()


@pytest.mark.parametrize("size", [0, 5, 1000, -100])
def test_truncated_training_checkpoint_is_one_clear_error(size, config, tmp_path):
    _interrupted(config(), tmp_path / "out")
    file = tmp_path / "out" / "run" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged; remove it to start this run again"):
        train(config(), tmp_path / "out")
    assert file.is_file()  # nothing is lost


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


def test_logging_settings_may_change_in_a_resumed_run(config, tmp_path):
    _interrupted(config(), tmp_path / "out")
    assert train(config(log_every=3, checkpoint_every=50), tmp_path / "out")["resumed_from"] == 2


@pytest.mark.parametrize("cause", ["learning_rate", "weight"])
def test_loss_that_is_not_finite_stops_with_the_step_and_the_terms(cause, config, tmp_path):
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": []}, "no training data"),
        ({"data": ["/nowhere.txt"]}, "no such data file: /nowhere.txt"),
        ({"base": "/nowhere"}, "/nowhere is not a model folder"),
        ({"sequence_length": 100_000}, "shorter than one block of 100000 tokens"),
        ({"micro_batch_size": 3, "batch_size": 4}, "micro_batch_size 3 does not divide the 4 sequences"),
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


def test_command_line_trains_and_ends_with_one_json_line(config, run_cli, tmp_path):
    (tmp_path / "more.txt").write_text(random_text(500, seed=1))
    code, out, err = run_cli(
        "train", "--out", tmp_path / "out", *_assignments(config(), steps=2), tmp_path / "more.txt"
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    assert json.loads(out)["data"] == ["text.txt", "more.txt"]
    assert "step 2/2: loss" in err


def test_tensorboard_files_are_written(config, tmp_path):
    train(config(steps=1, tensorboard=True), tmp_path / "out")
    assert list((tmp_path / "out" / "run" / "tensorboard").glob("events.*"))


def test_widths_of_the_start_are_those_of_the_export_unless_settled_anew(config, tmp_path):
    def widths(name, **fields):
        run = config(learning_rate=0.05, **fields)
        train(run, tmp_path / name)
        adapter = Adapter.load(tmp_path / name)
        shape = block_shape(AutoConfig.from_pretrained(run.base))
        plan = plan_widths(adapter, shape, None, run.width_multiple, run.head_dim_multiple)
        return plan.experts, plan.qk_dims

    start = widths("one-step", steps=1, widths_every=0)
    assert widths("frozen", steps=12, widths_every=0) == start
    assert widths("settled", steps=12, widths_every=2) != start
