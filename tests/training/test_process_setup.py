"""Settings of the process: the user's environment has priority."""

import os
import sys

from tomoe_training.process_setup import prepare_process, tune_malloc


def test_environment_of_the_user_has_priority(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    prepare_process()
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert int(os.environ.pop("MALLOC_MMAP_THRESHOLD_")) > 1 << 20


def test_other_systems_are_unchanged(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    tune_malloc()
