"""A short training run on the tiny llama: its settings, and what it leaves."""

import json

import pytest
import tomoe_training.trainer
import torch
from safetensors.torch import load_file
from tomoe_training.artifacts.adapter import ADAPTER_TENSORS

from tests.helpers.students import SETTINGS as METHOD_SETTINGS

SETTINGS = METHOD_SETTINGS | {
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


def assignments(config_, **fields):
    """The same run as command-line arguments."""
    settings = {k: getattr(config_, k) for k in SETTINGS} | fields
    sets = [part for k, v in settings.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    return ["--base", config_.base, "--data", *config_.data, *sets]


def metrics(out):
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


def tensors(out):
    return load_file(out / ADAPTER_TENSORS)


def assert_identical(out, other):
    mine, theirs = tensors(out), tensors(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def largest_difference(out, other):
    """Largest relative RMS difference of any tensor of two adapters."""
    mine, theirs = tensors(out), tensors(other)
    assert mine.keys() == theirs.keys()
    return max(((mine[n] - t).square().mean() / t.square().mean()).sqrt().item() for n, t in theirs.items())


def interrupt(config_, out):
    """A run folder with a checkpoint and no adapter, as a kill leaves it."""

    class StoppedError(Exception):
        pass

    step = tomoe_training.trainer._Run._step

    def stop(self, model, optimizer, noise, number):
        if number == 2:
            raise StoppedError
        return step(self, model, optimizer, noise, number)

    tomoe_training.trainer._Run._step = stop
    try:
        with pytest.raises(StoppedError):
            tomoe_training.trainer.train(config_, out)
    finally:
        tomoe_training.trainer._Run._step = step
    assert (out / "run" / "checkpoint.pt").is_file()
