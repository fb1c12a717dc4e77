"""Runs interpreted/ in new processes: Triton reads TRITON_INTERPRET when a kernel is imported."""

from pathlib import Path

import pytest

from tests.helpers.processes import environment, python

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
SLOW = {"test_tune", "test_value_mask_triton"}
"""Files of more than 30 seconds."""


@pytest.mark.process
@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=[pytest.mark.slow] if file.stem in SLOW else [], id=file.stem) for file in FILES],
)
def test_kernel_values_in_the_interpreter(file):
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", file, env=environment(TRITON_INTERPRET="1"))
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
