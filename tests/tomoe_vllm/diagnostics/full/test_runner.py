"""Child processes that crash, hang or never start cost one job and lose no result."""

import sys
import time
from pathlib import Path

import pytest

from tomoe_vllm.diagnostics.full.plan import Job, Options
from tomoe_vllm.diagnostics.full.runner import OUT_OF_TIME, Runner

pytestmark = pytest.mark.process

CHILD = """
import json, os, subprocess, sys, time
jobs = json.load(open(sys.argv[1]))["jobs"]
say = lambda line: print(json.dumps(line), flush=True)
for job in jobs:
    say({"begin": job["name"]})
    if job["kind"] == "crash":
        print("the kernel wrote out of bounds", file=sys.stderr)
        sys.stderr.flush()
        os.kill(os.getpid(), 11)
    if job["kind"] == "exit":
        sys.exit("out of memory")
    if job["kind"] == "hang":
        print(subprocess.Popen(["sleep", "600"]).pid, file=open(job["arguments"]["pid_file"], "w"), flush=True)
        time.sleep(600)
    status = "failed" if job["kind"] == "failed" else "passed"
    for i in range(job["arguments"].get("results", 1)):
        say({"result": {"part": job["part"], "name": job["name"], "status": status, "reason": None,
                        "values": {"pid": os.getpid(), "variable": os.environ.get("DOCTOR_VARIABLE")}}})
    say({"end": job["name"]})
    if job["kind"] == "new process":
        sys.exit(0)
"""


def job(name, kind="fine", process="one", limit_s=60.0, environment=None, **arguments):
    return Job(
        part="kernels", name=name, kind=kind, process=process, limit_s=limit_s, arguments=arguments,
        environment=environment or {},
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """``run(jobs)``: their results as (name, status, reason), and ``run.results``."""

    def run(jobs, seconds=60.0, program=(sys.executable, "-c", CHILD)):
        run.results = []
        deadline = time.monotonic() + seconds
        Runner(Options(scratch=str(tmp_path)), tmp_path, deadline, run.results.append, program=program).run(jobs)
        return [(result.name, result.status, result.reason) for result in run.results]

    return run


def pids(run):
    return [result.values.get("pid") for result in run.results]


def test_jobs_of_one_process_share_it_and_other_jobs_get_their_own(run):
    jobs = [job("a"), job("b", results=2), job("c", process="two", environment={"DOCTOR_VARIABLE": "x"})]
    assert run(jobs) == [("a", "passed", None), ("b", "passed", None), ("b", "passed", None), ("c", "passed", None)]
    first, second, third, fourth = pids(run)
    assert first == second == third != fourth
    assert [result.values["variable"] for result in run.results] == [None, None, None, "x"]


def test_a_crash_is_a_failed_job_and_a_new_process_goes_on(run):
    results = run([job("a"), job("b", "crash"), job("c"), job("d", "exit"), job("e")])
    assert [(name, status) for name, status, _ in results] == [
        ("a", "passed"), ("b", "failed"), ("c", "passed"), ("d", "failed"), ("e", "passed"),
    ]  # fmt: skip
    assert results[1][2] == ("the process ended with signal 11 (SIGSEGV): the kernel wrote out of bounds (one.log)")
    assert results[3][2] == "the process ended with exit code 1: out of memory (one.log)"


def has_ended(pid):
    """Whether the process is gone, or only waits to be collected by its new parent."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(200):
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_hanging_job_is_stopped_with_all_its_processes(run, tmp_path):
    results = run([job("a", "hang", limit_s=1, pid_file=str(tmp_path / "pid")), job("b")])
    assert results == [("a", "failed", "it was stopped after 1 s (one.log)"), ("b", "passed", None)]
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_what_does_not_fit_is_not_run(run, tmp_path):
    hanging = job("b", "hang", pid_file=str(tmp_path / "pid"))
    results = run([job("a"), hanging, job("c"), job("d", process="two")], seconds=5)
    assert [(name, status) for name, status, _ in results] == [
        ("a", "passed"), ("b", "not run"), ("c", "not run"), ("d", "not run"),
    ]  # fmt: skip
    assert {reason for _, status, reason in results if status == "not run"} == {OUT_OF_TIME}


def test_a_child_that_cannot_start_is_started_once(run):
    results = run(
        [job("a"), job("b"), job("c", process="two")], program=(sys.executable, "-c", "import no_such_module")
    )
    assert [(name, status) for name, status, _ in results] == [("a", "failed"), ("b", "not run"), ("c", "failed")]
    assert "No module named 'no_such_module'" in results[0][2]


def test_a_child_that_does_nothing_is_not_started_for_ever(run):
    results = run([job("a"), job("b")], seconds=10, program=(sys.executable, "-c", ""))
    assert results == [
        ("a", "failed", "the process ended with exit code 0 (one.log)"), ("b", "not run", "its process cannot start"),
    ]  # fmt: skip


def test_a_child_may_ask_for_a_new_process(run):
    assert [status for _, status, _ in run([job("a", "new process"), job("b")])] == ["passed", "passed"]
    assert len(set(pids(run))) == 2
