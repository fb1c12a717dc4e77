"""Runs interpreted/ in new processes: Triton reads TRITON_INTERPRET when a kernel is imported."""

from pathlib import Path

import pytest

from tests.helpers.processes import environment, python

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.process
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernel_values_in_the_interpreter(file):
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", file, env=environment(TRITON_INTERPRET="1"))
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
