"""The Makefile checks the NVIDIA driver before it installs anything. nvidia-smi is a script here that prints as one."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
A100 = "NVIDIA A100-SXM4-80GB, 550.54.15"
H200 = "NVIDIA H200, 580.105.08"


@pytest.fixture
def make(tmp_path):
    """Run make with ``nvidia-smi`` printing ``gpu``; returns its exit code, its output, and the folder of the .venv.

    The python of the fake .venv and the system's python answer as their arguments ask: pip only says that it ran.
    """
    tools, venv = tmp_path / "tools", tmp_path / "venv"
    tools.mkdir()

    def write(name: str, script: str) -> None:
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)

    write("pip-python", 'echo "ran: $*"; case "$*" in *venv*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";; esac')
    write("python", f'case "$*" in *driver*) exec {sys.executable} -S "$@";; esac; exec {tools}/pip-python "$@"')

    def run(gpu: str | None, *arguments: str) -> tuple[int, str, Path]:
        if gpu is not None:
            write("nvidia-smi", f'case "$1" in -L) echo "GPU 0: {gpu}";; --query*) echo "{gpu}";; esac')
        result = subprocess.run(
            ["make", f"PYTHON={tools}/python", f"VENV={venv}", *arguments],
            cwd=REPOSITORY, env={"PATH": f"{tools}:/usr/bin:/bin"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return result.returncode, result.stdout + result.stderr, venv

    return run


@pytest.mark.process
def test_a_driver_that_is_too_old_ends_the_installation_before_it_begins(make):
    code, output, venv = make(A100, "install")
    assert code != 0
    assert "driver 550.54.15: too old" in output
    assert "needs driver 580.65.06 or newer" in output
    assert "make install EXTRA=cpu" in output
    assert "ran:" not in output
    assert not venv.exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("gpu", "arguments", "extra"),
    [
        pytest.param(H200, [], "gpu", id="new driver"),
        pytest.param(A100, ["EXTRA=cpu"], "cpu", id="old driver, told to do without the GPU"),
        pytest.param(None, [], "cpu", id="no GPU"),
    ],
)
def test_any_other_machine_is_installed(make, gpu, arguments, extra):
    code, output, venv = make(gpu, "install", *arguments)
    assert code == 0, output
    assert f".[{extra},train,eval,serve,bench,dev]" in output
    assert (venv / ".installed").exists()
    is_checked = "ran: -m tomoe_vllm.diagnostics.driver --torch" in output
    assert is_checked == (extra == "gpu"), "whether torch finds the GPU is checked after the installation"
