"""Process set-up: harmless to repeat, and kinder than the user's own settings."""

import os
import sys

import torch
from tomoe_training.runtime import has_fast_bfloat16, prepare_process, training_dtype, tune_malloc


def test_user_settings_win(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    prepare_process()
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert int(os.environ.pop("MALLOC_MMAP_THRESHOLD_")) > 1 << 20


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    tune_malloc()


def test_gpus_have_fast_bfloat16_and_cpus_by_their_units(monkeypatch):
    assert has_fast_bfloat16(torch.device("cuda"))
    for units, expected in (({}, False), ({"avx2": True}, False), ({"amx_bf16": True}, True), ({"amx_bf16": 0}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        assert has_fast_bfloat16(torch.device("cpu")) is expected


def test_automatic_dtype_is_the_fast_one(monkeypatch):
    for units, expected in (({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        assert training_dtype("auto", torch.device("cpu")) == expected
        assert training_dtype("float32", torch.device("cpu")) == torch.float32
