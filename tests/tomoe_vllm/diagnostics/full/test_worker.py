"""Errors inside a job are results, and kinds of jobs have a module."""

import json

import pytest

from tests.helpers.processes import environment, python
from tomoe_vllm.diagnostics.full import training_jobs
from tomoe_vllm.diagnostics.full.plan import Job, Options, make_plan, write_jobs
from tomoe_vllm.diagnostics.full.report import NotRunError
from tomoe_vllm.diagnostics.full.worker import KINDS, gpu_is_lost, run_job

JOB = Job(part="training", name="steps", kind="training steps", process="p", limit_s=1)


def test_every_planned_job_has_a_module():
    assert {job.kind for job in make_plan(Options())} == set(KINDS)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NotRunError("accelerate is not installed"), "not run", "accelerate is not installed"),
        (RuntimeError("CUDA out of\n memory"), "failed", "RuntimeError: CUDA out of memory"),
    ],
)
def test_an_error_is_a_result(error, status, reason, monkeypatch):
    def raises(job, options):
        raise error
        yield

    monkeypatch.setattr(training_jobs, "run", raises)
    (result,) = run_job(JOB, Options())
    assert (result.name, result.status, result.reason) == ("steps", status, reason)


def test_a_context_that_a_kernel_destroyed_is_noticed(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not gpu_is_lost()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    assert gpu_is_lost()


@pytest.mark.process
def test_standard_output_has_only_lines_of_the_protocol_and_vllm_is_not_imported(tmp_path):
    jobs = [job for job in make_plan(Options(interpret=True)) if job.kind == "kernel"][:2]
    write_jobs(jobs, Options(interpret=True), tmp_path / "jobs.json")
    code = f"""
import sys
sys.modules["vllm"] = None
import tomoe_vllm.diagnostics.full.run, tomoe_vllm.diagnostics.full.training_jobs
from tomoe_vllm.diagnostics.full import kernel_jobs, worker
run = kernel_jobs.run
kernel_jobs.run = lambda *arguments: (print("noise"), run(*arguments))[1]
sys.argv = ["", {str(tmp_path / "jobs.json")!r}]
worker.main()
"""
    result = python("-c", code, env=environment(TRITON_INTERPRET="1"))
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [next(iter(line)) for line in lines] == ["begin", "result", "end"] * 2
    assert [line["result"]["status"] for line in lines if "result" in line] == ["passed", "passed"]
    assert lines[0]["begin"] == jobs[0].name
    assert result.stderr.count("noise") == 2
