"""Runs jobs in child processes until the time is over. A crash or a hang costs one job, and no result is lost.

A child (``worker.py``) reads its jobs from a file and prints one JSON object per line: ``{"begin": name}``,
``{"result": {...}}`` and ``{"end": name}``. After a crash a new child continues with the next job.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from tomoe_vllm.diagnostics.full.plan import Job, Options, process_environment, write_jobs
from tomoe_vllm.diagnostics.full.report import FAILED, NOT_RUN, Result

WORKER = (sys.executable, "-m", "tomoe_vllm.diagnostics.full.worker")
OUT_OF_TIME = "out of time"
START_S = 120.0
"""Time for a child to start: it imports torch, on a cold file system."""


class _Child:
    """One child process, its lines, and its log."""

    def __init__(self, program: Sequence[str], jobs: list[Job], options: Options, log: Path) -> None:
        file = Path(options.scratch) / "jobs.json"
        write_jobs(jobs, options, file)
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [*program, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=process_environment(jobs[0], options),
                start_new_session=True,  # vLLM starts processes of its own: all are stopped together
            )
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next(self, timeout_s: float) -> dict | None:
        """The next object; None at the end of the output. Raises ``queue.Empty`` after ``timeout_s``."""
        line = self._lines.get(timeout=max(0.0, timeout_s))
        return None if line is None else json.loads(line)

    def stop(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def why_it_ended(self) -> str:
        """How the process ended, and the last line that it wrote to its log."""
        code = self.process.wait()
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        lines = self.log.read_bytes()[self._log_start :].decode(errors="replace").strip().splitlines()
        last = f": {lines[-1].strip()[:300]}" if lines else ""
        return f"the process ended with {how}{last} ({self.log.name})"


class Runner:
    """Runs jobs. ``deadline``: on the clock of :func:`time.monotonic`; ``on_result`` gets each result at once."""

    def __init__(
        self,
        options: Options,
        logs: Path,
        deadline: float,
        on_result: Callable[[Result], None],
        on_group: Callable[[], None] = lambda: None,
        program: Sequence[str] = WORKER,
    ) -> None:
        self.options, self.logs, self.deadline = options, logs, deadline
        self.on_result, self.on_group, self.program = on_result, on_group, program

    def run(self, jobs: list[Job]) -> None:
        """Run all jobs that fit before the deadline; the others are results too ("not run")."""
        while jobs:
            if time.monotonic() >= self.deadline:
                for job in jobs:
                    self._report(job, NOT_RUN, OUT_OF_TIME)
                jobs = []
            else:
                _, together = next(groupby(jobs, key=lambda job: job.process))
                group = list(together)
                jobs = jobs[self._run_group(group) :]
            self.on_group()

    def _report(self, job: Job, status: str, reason: str) -> None:
        self.on_result(Result(part=job.part, name=job.name, status=status, reason=reason))

    def _run_group(self, group: list[Job]) -> int:
        """Run jobs in one child until it ends. Returns how many are done; the last of these may have crashed."""
        name = "".join(c if c.isalnum() else "-" for c in group[0].process)
        child = _Child(self.program, group, self.options, self.logs / f"{name}.log")
        num_done, is_begun = 0, False
        job_ends = time.monotonic() + START_S
        try:
            while num_done < len(group):
                job = group[num_done]
                try:
                    line = child.next(min(job_ends, self.deadline) - time.monotonic())
                except queue.Empty:
                    if time.monotonic() >= self.deadline:
                        self._report(job, NOT_RUN, OUT_OF_TIME)
                    else:
                        limit_s = job.limit_s if is_begun else START_S
                        self._report(job, FAILED, f"it was stopped after {limit_s:.0f} s ({child.log.name})")
                    return num_done + 1
                if line is None:
                    if num_done and not is_begun and child.process.wait() == 0:
                        return num_done  # the child asks for a new process
                    self._report(job, FAILED, child.why_it_ended())
                    if num_done == 0 and not is_begun:
                        return self._give_up(group)
                    return num_done + 1
                if "begin" in line:
                    is_begun, job_ends = True, time.monotonic() + job.limit_s
                elif "result" in line:
                    self.on_result(Result(**line["result"]))
                else:
                    num_done, is_begun = num_done + 1, False
                    job_ends = time.monotonic() + START_S
            return num_done
        finally:
            child.stop()

    def _give_up(self, group: list[Job]) -> int:
        """A process that cannot even start would fail for each of its jobs: report the others as not run."""
        for job in group[1:]:
            self._report(job, NOT_RUN, "its process cannot start")
        return len(group)
