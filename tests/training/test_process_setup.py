"""Process set-up: harmless to repeat, and kinder than the user's own settings."""

import os
import sys

from tomoe_training.process_setup import prepare_process, tune_malloc


def test_user_settings_win(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    prepare_process()
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert int(os.environ.pop("MALLOC_MMAP_THRESHOLD_")) > 1 << 20


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    tune_malloc()
