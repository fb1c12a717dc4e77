"""A real engine on a tiny model, compared, timed and reloaded; and one that crashes while it starts."""

import sys
import time

import pytest

from tomoe_vllm.diagnostics.full.engine_jobs import EngineRun, Setup
from tomoe_vllm.diagnostics.full.plan import Job, Options, make_plan
from tomoe_vllm.diagnostics.full.runner import Runner

WORKER = """
import os
from tomoe_vllm.diagnostics.full import engine_jobs, worker

start = engine_jobs.EngineRun.start

def start_or_crash(self):
    if self.layout == "dense":
        os.abort()
    return start(self)

engine_jobs.EngineRun.start = start_or_crash
worker.main()
"""


@pytest.mark.slow
@pytest.mark.engine
def test_an_engine_is_checked_and_a_crash_of_another_costs_nothing(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    options = Options(interpret=True, scratch=str(tmp_path))
    wanted = ("models of the engine checks", "vLLM, dense", "vLLM, masked")
    jobs = [job for job in make_plan(options, ("engine",)) if job.name in wanted]
    results = []
    program = (sys.executable, str(tmp_path / "worker.py"))
    Runner(options, tmp_path, time.monotonic() + 300, results.append, program=program).run(jobs)
    statuses = {result.name: result.status for result in results}
    reasons = {result.name: result.reason for result in results}
    assert statuses == {
        "models of the engine checks": "done",
        "vLLM, dense": "failed",
        "vLLM, masked: starts": "passed",
        "vLLM, masked: generates": "passed",
        "vLLM, masked: decode": "passed",
        "vLLM, masked: prefill": "passed",
        "vLLM, masked: reload_weights": "passed",
        "vLLM, masked: decode agrees with HF": "passed",
        "vLLM, masked: prefill agrees with HF": "passed",
    }, reasons
    assert "signal 6 (SIGABRT)" in reasons["vLLM, dense"]
    values = {result.name.partition(": ")[2]: result.values for result in results}
    assert [(row["batch"], row["path"]) for row in values["decode"]["rows"]] == [(1, "masked"), (4, "masked")]
    assert values["decode agrees with HF"]["tokens"] == 16 * 5
    assert values["decode agrees with HF"]["mean_difference"] < 1e-4


def test_after_an_error_the_engine_is_not_used_again(tmp_path):
    job = Job(part="engine", name="vLLM, masked", kind="engine", process="p", limit_s=1)
    run = EngineRun(job, "masked", tmp_path, Setup.here())

    def fail():
        raise RuntimeError("CUDA error")

    first, second = run._check("starts", fail), run._check("generates", lambda: (None, {}))
    assert (first.status, first.reason) == ("failed", "RuntimeError: CUDA error")
    assert (second.status, second.reason) == ("not run", "an earlier check broke the engine")
    run = EngineRun(job, "masked", tmp_path, Setup.here())
    assert run._check("reload_weights", lambda: ("logprobs change", {"max_difference": 1.0})).status == "failed"
    assert run._check("decode", lambda: (None, {})).status == "passed", "a wrong value does not break the engine"
