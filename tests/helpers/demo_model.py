"""The demo's real model, made as a user makes it: SmolLM2-135M from its package, the shipped adapter, export."""

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import REPOSITORY

ADAPTER = REPOSITORY / "adapters" / "smollm2-135m-p70"
NUM_PARAMETERS = 134_515_008


def tomoe(*arguments: object) -> dict:
    """Run a command as a user does; its last line on standard output."""
    command = [Path(sys.executable).parent / "tomoe", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def save_demo_base(folder: Path) -> Path:
    """The dense model."""
    assert tomoe("demo-model", "--out", folder)["parameters"] == NUM_PARAMETERS
    return folder


def save_demo_checkpoint(folder: Path, base: Path) -> Path:
    """The shipped adapter exported at the budget it was trained for."""
    tomoe("export", "--base", base, "--adapter", ADAPTER, "--out", folder)
    return folder
