"""Runs that are killed and resumed, and runs on several processes."""

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tomoe_training.artifacts.adapter import ADAPTER_CONFIG, ADAPTER_TENSORS
from tomoe_training.trainer import train

from tests.helpers.processes import environment, python, start_python
from tests.helpers.runs import assert_identical, assignments, interrupt, largest_difference, metrics
from tests.helpers.servers import free_port

pytestmark = pytest.mark.process


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
    command = ["-m", "tomoe_vllm.cli", "train", "--out", killed, *assignments(config(), **fields)]
    process = start_python(*command)
    _kill_at(process, killed, 12)
    assert not (killed / ADAPTER_CONFIG).exists()
    first = torch.load(killed / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert first >= 10
    assert first % 5 == 0
    assert train(config(**fields), killed)["resumed_from"] == first
    train(config(**fields), whole)
    assert_identical(killed, whole)
    assert [row["step"] for row in metrics(killed)] == list(range(1, 41))
    for mine, theirs in zip(metrics(killed), metrics(whole), strict=True):
        assert mine["loss"] == theirs["loss"]
    # A third start finds the run finished.
    before = (killed / ADAPTER_TENSORS).stat().st_mtime_ns
    assert train(config(**fields), killed)["resumed_from"] == 40
    assert (killed / ADAPTER_TENSORS).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "fields",
    [
        {},
        # All processes sample the text together, and gather layers again in the backward pass.
        {"shard_base": True, "data": ["self"], "self_tokens": 2000, "gradient_checkpointing": True},
        # R_L and R_P are products of means.
        pytest.param({"batch_size": 4, "micro_batch_size": 1, "budget": "penalty"}, marks=pytest.mark.slow),
    ],
    ids=["copies", "sharded", "micro-batches"],
)
def test_two_processes_train_the_adapter_of_one(fields, config, tmp_path):
    base = shutil.copytree(config().base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"unused": torch.ones(1)}, base / "model.safetensors", metadata={"format": "pt"})
    fields = {"base": str(base), "mask_noise": 1.0, "router_noise": 1.0, "steps": 5} | fields
    train(config(**fields), tmp_path / "one")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    sets = assignments(config(**fields), **fields)
    result = python(
        *launch, "-m", "tomoe_vllm.cli", "train", "--out", tmp_path / "two", *sets,
        env=environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert [json.loads(line)["steps"] for line in result.stdout.splitlines()] == [5]  # of the first process
    assert result.stderr.count("they are ignored") == 1
    assert largest_difference(tmp_path / "two", tmp_path / "one") < 1e-5
    terms = [[row[k] for row in metrics(tmp_path / n) for k in ("task", "r_l", "r_u")] for n in ("one", "two")]
    assert terms[1] == pytest.approx(terms[0], abs=2e-5)


@pytest.mark.slow
def test_accelerate_launch_trains_the_same_adapter(config, tmp_path):
    train(config(steps=2), tmp_path / "plain")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tomoe_vllm.cli"]
    result = python(*launch, "train", "--out", tmp_path / "launched", *assignments(config(), steps=2))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_identical(tmp_path / "launched", tmp_path / "plain")


def test_logging_settings_may_change_in_a_resumed_run(config, tmp_path):
    interrupt(config(), tmp_path / "out")
    assert (
        train(config(log_every=3, checkpoint_every=50, process_timeout_minutes=5), tmp_path / "out")["resumed_from"]
        == 2
    )
