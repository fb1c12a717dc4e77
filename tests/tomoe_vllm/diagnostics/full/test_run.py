"""``tomoe doctor --full`` as a command: the whole flow on a CPU, misuse, and what it leaves behind."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tomoe_vllm.diagnostics.driver import Driver
from tomoe_vllm.diagnostics.full import run as run_module
from tomoe_vllm.diagnostics.full.plan import Options, make_plan
from tomoe_vllm.diagnostics.full.report import Result
from tomoe_vllm.diagnostics.full.run import first_kernels, full_doctor
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import read_validation

BROKEN_WORKER = """
from tomoe_vllm.diagnostics.full import worker
from tomoe_vllm.kernels.expert_mlp.triton import grouped

kernel = grouped.expert_mlp_grouped
grouped.expert_mlp_grouped = lambda *arguments: kernel(*arguments) * 1.001
worker.main()
"""
FAKE_WORKER = """
import json, os, sys
jobs = json.load(open(sys.argv[1]))["jobs"]
for job in jobs:
    print(json.dumps({"begin": job["name"]}))
    if job["kind"] == "engine":
        os.abort()
    result = {"part": job["part"], "name": job["name"], "status": "passed", "reason": None, "values": {}}
    print(json.dumps({"result": result}))
    print(json.dumps({"end": job["name"]}), flush=True)
"""


def program_of(source, folder):
    file = folder / "worker.py"
    file.write_text(source)
    return sys.executable, str(file)


def report_in(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is named and never used."""
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "NVIDIA H200")


@pytest.mark.process
def test_kernels_are_checked_in_the_interpreter(run_cli, tmp_path):
    code, out, err = run_cli("doctor", "--full", "--interpret", "--only", "kernels", "--out", tmp_path / "report")
    answer = json.loads(out.splitlines()[-1])
    assert answer["failures"] == [], err
    assert code == 1, "no GPU was checked"
    facts = report_in(tmp_path / "report")
    assert facts["is_complete"]
    assert facts["command"] == "tomoe doctor --full --interpret --only kernels"
    assert {result["values"]["path"] for result in facts["results"]} == {
        "gather", "dense", "grouped", "route", "mask_values", "activation",
    }  # fmt: skip
    assert answer["summary"] == f"{len(facts['results'])} checks, 0 failed"
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| tiny without gate, float32, mask_values | 1 |" in page
    assert str(Path.home()) not in page
    assert str(tmp_path) not in page


@pytest.mark.process
def test_a_kernel_that_is_wrong_is_in_the_report(tmp_path, monkeypatch):
    def grouped_only(options, parts):
        return [job for job in make_plan(options, parts) if job.arguments.get("path") in ("grouped", "dense")][:8]

    monkeypatch.setattr(run_module, "make_plan", grouped_only)
    facts, code = full_doctor(
        None, tmp_path / "report", interpret=True, only=["kernels"], program=program_of(BROKEN_WORKER, tmp_path)
    )
    assert code == 1
    assert len(facts["failures"]) == 4
    assert all(line.startswith("grouped, ") and "relative error 1.0e-03" in line for line in facts["failures"])
    assert "## Failed\n\n" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.process
def test_an_engine_that_crashes_loses_nothing(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "has_vllm", lambda: True)
    facts, code = full_doctor(None, tmp_path / "report", program=program_of(FAKE_WORKER, tmp_path))
    results = {result["name"]: result for result in report_in(tmp_path / "report")["results"]}
    assert code == 1
    assert list(results) == [job.name for job in make_plan(Options())]
    failed = [name for name, result in results.items() if result["status"] == "failed"]
    assert failed == [f"vLLM, {name}" for name in ("dense", "masked", "shared", "observer", "fused")]
    assert "signal 6 (SIGABRT)" in results["vLLM, dense"]["reason"]
    assert len(facts["failures"]) == 5


@pytest.mark.process
def test_kernels_of_a_gpu_that_agree_are_validated_and_the_code_is_0(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "has_vllm", lambda: False)
    facts, code = full_doctor(None, tmp_path / "report", program=program_of(FAKE_WORKER, tmp_path))
    assert code == 0
    assert facts["summary"].endswith("checks, 0 failed, 1 not run")
    assert read_validation("NVIDIA H200").agrees
    results = report_in(tmp_path / "report")["results"]
    assert [r["reason"] for r in results if r["part"] == "engine"] == ["vLLM is not installed"]


@pytest.mark.process
def test_what_is_out_of_time_is_not_run_and_validates_nothing(gpu, tmp_path):
    _, code = full_doctor(None, tmp_path / "report", minutes=0.05, program=program_of(FAKE_WORKER, tmp_path))
    results = report_in(tmp_path / "report")["results"]
    assert {result["status"] for result in results} == {"not run"}
    assert code == 1, "nothing was checked"
    assert read_validation("NVIDIA H200") is None


def test_the_validation_record_names_failed_kernels(gpu, tmp_path):
    report = run_module.Report(
        folder=tmp_path, command="", environment=run_module.public_environment(), is_interpreted=False, limit_s=60
    )
    run = run_module._Run(report, Options(), ("kernels",), program=())
    first = sorted(first_kernels(run.jobs))
    for name in first[:-1]:
        run.add(Result(part="kernels", name=name, status="passed"))
    run.save()
    assert read_validation("NVIDIA H200") is None, "one check is missing"
    run.add(Result(part="kernels", name=first[-1], status="failed", reason="relative error 1"))
    run.save()
    assert read_validation("NVIDIA H200").failures == [f"{first[-1]}: relative error 1"]
    run.add(Result(part="kernels", name="grouped, 3 tokens, float32", status="failed", reason="wrong"))
    run.save()
    assert len(read_validation("NVIDIA H200").failures) == 2


def test_ctrl_c_leaves_a_report(gpu, tmp_path, monkeypatch):
    def interrupt(self, jobs):
        self.on_result(Result(part="kernels", name="a", status="passed"))
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Runner, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        full_doctor(None, tmp_path / "report")
    facts = report_in(tmp_path / "report")
    assert not facts["is_complete"]
    assert "a" in [result["name"] for result in facts["results"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--full"], "--full needs --out"),
        (["--out", "report"], "--out, --only and --minutes are options of --full"),
        (["--minutes", "2"], "--out, --only and --minutes are options of --full"),
        (["--only", "kernels"], "--out, --only and --minutes are options of --full"),
        (
            ["--full", "--interpret", "--out", "report", "--only", "speed"],
            "--only is 'speed'; it must be one of kernels",
        ),
        (["--full", "--interpret", "--out", "there"], "--out there already exists"),
        (["--full", "--interpret", "--out", "there/file/report"], "cannot be written: Not a directory"),
        (["--full", "--interpret", "--out", "report", "--model", "there"], "config.json"),
        (["--full", "--interpret", "--out", "report", "--minutes", "0"], "0.5"),
    ],
)
def test_misuse_is_one_line_and_code_2(arguments, message, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    code, out, err = run_cli("doctor", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "report").exists()


def test_without_a_gpu_one_line_says_why(run_cli, tmp_path, monkeypatch):
    old = Driver(gpus=("NVIDIA A100",), version="550.54.15", cuda="12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for driver, message in ((None, "no GPU; --interpret runs"), (old, "needs driver 580.65.06 or newer")):
        monkeypatch.setattr(run_module, "installed_driver", lambda driver=driver: driver)
        code, out, err = run_cli("doctor", "--full", "--out", tmp_path / "report")
        assert (code, out) == (1, "")
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "report").exists()


def test_without_triton_one_line_says_what_to_install(run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    code, _, err = run_cli("doctor", "--full", "--interpret", "--out", tmp_path / "report")
    assert code == 1
    assert "install it with: pip install triton" in err
    assert len(err.splitlines()) == 1
