"""The check of the NVIDIA driver, on output of nvidia-smi as drivers 450 to 610 print it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tomoe_vllm.diagnostics import driver as driver_module
from tomoe_vllm.diagnostics.driver import CUDA_OF_WHEELS, Driver, is_too_old, parse, why_no_cuda

REPOSITORY = Path(__file__).resolve().parents[3]
TABLE_450 = """\
Wed Jul 29 21:51:11 2020
+-----------------------------------------------------------------------------+
| NVIDIA-SMI 450.57       Driver Version: 450.57       CUDA Version: 11.0     |
|-------------------------------+----------------------+----------------------+
"""
TABLE_550 = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
|-----------------------------------------+------------------------+----------------------+
"""
TABLE_535_WITH_COMPATIBILITY_PACKAGE = """\
+---------------------------------------------------------------------------------------+
| NVIDIA-SMI 535.183.06             Driver Version: 535.183.06   CUDA Version: 13.0     |
|-----------------------------------------+----------------------+----------------------+
"""
TABLE_580 = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.105.08             Driver Version: 580.105.08     CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
"""
TABLE_610 = """\
Sun Jun  7 08:16:57 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: 13.3     |
+-----------------------------------------+------------------------+----------------------+
"""
CASES = [
    pytest.param("TITAN Xp, 450.57\n", TABLE_450, "11.0", True, id="450"),
    pytest.param("NVIDIA A100-SXM4-80GB, 550.54.15\n" * 8, TABLE_550, "12.4", True, id="550"),
    pytest.param("NVIDIA H100 80GB HBM3, 535.183.06\n", TABLE_535_WITH_COMPATIBILITY_PACKAGE, "13.0", False, id="535"),
    pytest.param("NVIDIA H200, 580.105.08\n", TABLE_580, "13.0", False, id="580"),
    pytest.param("NVIDIA B200, 610.43.02\n", TABLE_610, "13.3", False, id="610"),
    pytest.param("NVIDIA H200, 580.65.06\n", "", None, False, id="no table, the oldest driver"),
    pytest.param("NVIDIA H200, 580.9\n", "", None, True, id="no table, 580.9 is older than 580.65"),
]


@pytest.mark.parametrize(("query", "table", "cuda", "too_old"), CASES)
def test_output_of_nvidia_smi_is_read(query, table, cuda, too_old):
    driver = parse(query, table)
    assert (driver.cuda, is_too_old(driver)) == (cuda, too_old)
    assert driver.version in query
    assert len(driver.gpus) == query.count("\n")


@pytest.mark.parametrize("query", ["", "No devices were found\n", "[N/A], [N/A]\n"])
def test_no_gpu_in_the_output(query):
    assert parse(query, "") is None


def test_builds_for_cuda_12_run_on_older_drivers():
    assert not is_too_old(parse("NVIDIA A100, 550.54.15", TABLE_550), "12.8")
    assert is_too_old(parse("TITAN Xp, 450.57", TABLE_450), "12.8")


@pytest.mark.parametrize(
    ("query", "table", "torch", "words"),
    [
        pytest.param(
            "NVIDIA A100, 550.54.15\nNVIDIA A100, 550.54.15\n", TABLE_550, ("2.13.0+cu130", "13.0"),
            ("2 x NVIDIA A100 (driver 550.54.15)", "needs driver 580.65.06 or newer"), id="old driver"),
        pytest.param("NVIDIA H200, 580.105.08", TABLE_580, ("2.13.0+cpu", None), ("without CUDA",), id="CPU build"),
        pytest.param(
            "NVIDIA H200, 580.105.08", TABLE_580, ("2.13.0", "13.0"), ("check CUDA_VISIBLE_DEVICES",), id="hidden GPU"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_does_not_find_is_explained_in_one_line(query, table, torch, words):
    line = why_no_cuda(parse(query, table), *torch)
    assert "\n" not in line
    assert all(word in line for word in words)


def test_without_a_gpu_there_is_nothing_to_explain():
    assert why_no_cuda(None, "2.13.0+cpu", None) is None


def test_different_gpus_are_all_named():
    driver = Driver(gpus=("NVIDIA A100", "NVIDIA H100", "NVIDIA A100"), version="580.1", cuda=None)
    assert driver.gpu == "2 x NVIDIA A100 and NVIDIA H100"


def run_module(folder, script):
    """The module's exit code and output on the plain standard library, with this ``nvidia-smi`` as the only program."""
    if script:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nvidia-smi").chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-S", "-m", "tomoe_vllm.diagnostics.driver"],
        cwd=REPOSITORY, env={"PATH": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def printing(query, table):
    return f"if [ $# -gt 0 ]; then echo '{query}'; else echo '{table}'; fi"


def test_module_refuses_a_driver_that_is_too_old(tmp_path):
    code, out = run_module(tmp_path, printing("NVIDIA A100, 550.54.15", TABLE_550))
    assert code == 1
    assert (
        f"driver 550.54.15: too old. vLLM and torch from the package index are built for CUDA {CUDA_OF_WHEELS}" in out
    )
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "word"),
    [
        pytest.param(printing("NVIDIA B200, 610.43.02", TABLE_610), "new enough", id="new driver"),
        pytest.param(None, "no NVIDIA GPU", id="no nvidia-smi"),
        pytest.param(
            "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", "no NVIDIA GPU", id="fails"
        ),
    ],
)
def test_module_lets_any_other_machine_pass(script, word, tmp_path):
    code, out = run_module(tmp_path, script)
    assert (code, len(out.splitlines())) == (0, 1)
    assert word in out


def test_a_gpu_that_the_installed_torch_does_not_find_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(driver_module, "installed_driver", lambda: parse("NVIDIA A100, 550.54.15", TABLE_550))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert driver_module.check_torch() == 1
    assert "needs driver 580.65.06 or newer" in capsys.readouterr().err
    monkeypatch.setattr(driver_module, "installed_driver", lambda: None)
    assert driver_module.check_torch() == 0
