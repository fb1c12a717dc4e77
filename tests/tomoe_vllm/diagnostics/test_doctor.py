"""``tomoe doctor``: output, validation record and exit code, on this machine and on simulated GPUs."""

import json

import pytest
import torch

from tomoe_vllm.diagnostics import doctor
from tomoe_vllm.diagnostics.device import CudaDevice
from tomoe_vllm.diagnostics.doctor import chip_of, conclusion, examine
from tomoe_vllm.diagnostics.driver import Driver
from tomoe_vllm.diagnostics.layers import PATHS

CHECK = {
    "path": "gather", "num_tokens": 1, "routing": "random", "dtype": "bfloat16", "limit": 1e-2, "overall": 4e-3,
    "worst_row": 5e-3, "error": None, "ms": 0.2, "dense_ms": 0.3, "roofline_ms": 0.1, "agrees": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def facts_of(checks, failures, device="NVIDIA A100", validation_file="/x/doctor.json"):
    return {
        "checks": checks, "failures": failures, "device": device, "agrees": not failures,
        "validation_file": validation_file,
    }  # fmt: skip


def test_without_a_gpu_it_fails_with_a_message(run_cli):
    code, out, err = run_cli("doctor")
    assert code == 1
    assert err.splitlines()[-1].startswith("no GPU: the Triton kernels were not run")
    facts = json.loads(out.splitlines()[-1])
    assert (facts["agrees"], facts["checks"], facts["validation_file"]) == (None, [], None)
    assert {"torch", "triton", "vllm", "cpu_isa", "compiler"} <= facts["environment"].keys()


def test_a_gpu_that_torch_does_not_find_is_named_with_its_driver(run_cli, monkeypatch):
    old = Driver(gpus=("NVIDIA A100-SXM4-80GB",), version="550.54.15", cuda="12.4")
    monkeypatch.setattr(doctor, "installed_driver", lambda: old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    code, out, err = run_cli("doctor")
    assert code == 1
    assert "NVIDIA A100-SXM4-80GB (driver 550.54.15)" in err.splitlines()[-2]
    assert "needs driver 580.65.06 or newer" in err.splitlines()[-2]
    assert json.loads(out.splitlines()[-1])["environment"]["driver"] == "550.54.15"


@pytest.mark.process
def test_interpreter_runs_every_check_and_writes_no_validation_record(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    code, out, err = run_cli("doctor", "--interpret")
    assert code == 1, "no GPU was checked"
    facts = json.loads(out.splitlines()[-1])
    assert facts["agrees"], facts["failures"]
    assert {check["path"] for check in facts["checks"]} == {*PATHS, "route", "mask_values", "activation"}
    assert f"all {len(facts['checks'])} checks agree" in err
    assert list(tmp_path.iterdir()) == []


def test_kernels_that_disagree_fail_and_refuse_the_shared_layout():
    broken = CHECK | {"agrees": False}
    lines, code = conclusion(facts_of([CHECK, broken], ["gather, 1 tokens: relative RMS 1"]))
    assert code == 1
    assert "gather, 1 tokens" in lines[0]
    assert "1 of 2 checks disagree (NVIDIA A100): the shared layout is refused" in lines[1]


def test_kernels_that_agree_on_a_gpu_succeed():
    lines, code = conclusion(facts_of([CHECK], []))
    assert code == 0
    assert lines[-1] == "validation record: /x/doctor.json"


class FakeGPU(CudaDevice):
    """Allocates and measures nothing."""

    def __init__(self):
        pass


def test_validation_record_of_a_gpu_is_written(monkeypatch, tmp_path):
    kernel_checks = pytest.importorskip("tomoe_vllm.diagnostics.kernel_checks", reason="Triton is in the dev extra")
    from tomoe_vllm.diagnostics import gate_checks
    from tomoe_vllm.kernels.expert_mlp.triton.dispatch import read_validation

    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "NVIDIA A100-SXM4-80GB")
    wrong = kernel_checks.Check(
        path="grouped", num_tokens=16, routing="random", dtype="bfloat16", limit=1e-2, overall=1.0, worst_row=1.0
    )
    monkeypatch.setattr(kernel_checks, "run_checks", lambda *arguments: [wrong])
    monkeypatch.setattr(kernel_checks.Layer, "random", lambda *arguments: None)
    monkeypatch.setattr(gate_checks, "run_gate_checks", lambda *arguments: [])
    monkeypatch.setattr(doctor, "CudaDevice", FakeGPU)
    facts = examine()
    assert facts["agrees"] is False
    assert facts["chip"]["bandwidth"] == 2.039e12
    found = read_validation("NVIDIA A100-SXM4-80GB")
    assert not found.agrees
    assert "grouped, 16 tokens" in found.failures[0]
    assert conclusion(facts)[1] == 1


def test_table_has_a_cell_for_every_column():
    (row,) = doctor.rows(facts_of([CHECK], []))
    assert len(row) == len(doctor.COLUMNS)
    assert row[-2:] == ["50%", "agrees"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' model; supported families: llama"),
        ({"model_type": "llama", "hidden_act": "swish2"}, "hidden_act is 'swish2'"),
    ],
)
def test_unsupported_model_is_an_error(config, message, tmp_path, run_cli):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(sizes | config))
    code, out, err = run_cli("doctor", "--model", tmp_path)
    assert (code, out) == (2, "")
    assert message in err


def test_peak_rates_of_known_gpus_come_from_the_data_sheet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "NVIDIA H100 80GB HBM3")
    chip = chip_of(device=None)  # nothing is measured
    assert (chip.name, chip.flops) == ("NVIDIA H100 80GB HBM3", 989e12)
