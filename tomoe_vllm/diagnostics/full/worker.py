"""A child process of ``tomoe doctor --full``: runs the jobs of a file, one JSON object per line on standard output.

    python -m tomoe_vllm.diagnostics.full.worker JOBS

``runner.py`` describes the lines. What libraries print to standard output goes to standard error.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TextIO

from tomoe_vllm.diagnostics.full.plan import Job, Options, read_jobs
from tomoe_vllm.diagnostics.full.report import FAILED, NOT_RUN, NotRunError, Result

KINDS = {
    "rates": "kernel_jobs",
    "kernel": "kernel_jobs",
    "training steps": "training_jobs",
    "train on cpu": "training_jobs",
    "train on device": "training_jobs",
    "models": "engine_jobs",
    "engine": "engine_jobs",
}
"""Module with the function :func:`run` for each kind of job."""


def run_job(job: Job, options: Options) -> Iterator[Result]:
    """The results of one job. An error is a failed result."""
    try:
        module = import_module(f"tomoe_vllm.diagnostics.full.{KINDS[job.kind]}")
        run: Callable[[Job, Options], Iterator[Result]] = module.run
        yield from run(job, options)
    except NotRunError as why:
        yield Result(part=job.part, name=job.name, status=NOT_RUN, reason=str(why))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        yield Result(part=job.part, name=job.name, status=FAILED, reason=reason)
        traceback.print_exc()


def gpu_is_lost() -> bool:
    """Whether a kernel has destroyed this process's CUDA context: every later call would fail too."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> None:
    """Run all jobs; ends early, with code 0, if only a new process can run the next one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    jobs, options = read_jobs(Path(sys.argv[1]))
    for job in jobs:
        _say(answers, {"begin": job.name})
        for result in run_job(job, options):
            _say(answers, {"result": asdict(result)})
        _say(answers, {"end": job.name})
        if gpu_is_lost():
            break
    answers.flush()
    sys.stderr.flush()
    os._exit(0)  # vLLM's threads can outlive the interpreter, which then aborts


def _say(answers: TextIO, line: dict) -> None:
    print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main()
