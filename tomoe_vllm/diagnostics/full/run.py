"""The command ``tomoe doctor --full``: runs the plan, writes the report after each group of checks, and sums it up."""

import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tomoe_vllm.diagnostics.doctor import environment
from tomoe_vllm.diagnostics.driver import installed_driver, why_no_cuda
from tomoe_vllm.diagnostics.full.plan import PARTS, Job, Options, has_vllm, make_plan
from tomoe_vllm.diagnostics.full.report import DONE, FAILED, NOT_RUN, PASSED, Report, Result, make_folder
from tomoe_vllm.diagnostics.full.runner import WORKER, Runner
from tomoe_vllm.diagnostics.layers import layer_of
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import device_name, write_validation

CLOSING_S = 5.0
"""Of the time limit, for the last report and for stopping processes."""


def full_doctor(
    model: Path | None,
    out: Path,
    *,
    interpret: bool = False,
    minutes: float = 8.0,
    only: Sequence[str] = (),
    program: Sequence[str] = WORKER,
) -> tuple[dict[str, Any], int]:
    """Run all checks that fit into ``minutes`` and write the report to the new folder ``out``.

    Args:
        model: dense model or ToMoE checkpoint to check; default LLaMA-2 7B for kernels, and a random model for engines.
        out: folder of the report; must not exist.
        interpret: check on the CPU, kernels in Triton's interpreter.
        minutes: time limit of all checks.
        only: parts to run, of :data:`PARTS`; default all.
        program: the child process.

    Returns:
        What the command prints, and its exit code: 0 if checks were made on a GPU and all agree, otherwise 1.

    Raises:
        ValueError: misuse. OSError: ``out`` cannot be written. RuntimeError: no Triton, or no GPU.
    """
    for part in only:
        if part not in PARTS:
            raise ValueError(f"--only is {part!r}; it must be one of {', '.join(PARTS)}")
    if model is not None:
        layer_of(model)
    if find_spec("triton") is None:
        raise RuntimeError("the kernels need Triton, which is not installed; install it with: pip install triton")
    if not interpret and not torch.cuda.is_available():
        reason = why_no_cuda(installed_driver(), torch.__version__, torch.version.cuda) or "no GPU"
        raise RuntimeError(f"{reason}; --interpret runs the checks without one")
    make_folder(out)
    words = [*(["--interpret"] if interpret else []), *(f"--only {part}" for part in only)]
    command = " ".join(["tomoe doctor --full", *([f"--model {model.name}"] if model else []), *words])
    report = Report(
        folder=out, command=command, environment=public_environment(), is_interpreted=interpret, limit_s=60 * minutes
    )
    with tempfile.TemporaryDirectory(prefix="tomoe-doctor-") as scratch:
        options = Options(model=str(model) if model else None, interpret=interpret, scratch=scratch)
        _Run(report, options, tuple(only or PARTS), program).run()
    code = int(interpret or bool(report.count(FAILED)) or not report.count(PASSED))
    facts = {
        "report": str(out),
        "summary": report.summary(),
        "failures": [f"{result.name}: {result.reason}" for result in report.results if result.status == FAILED],
    }
    return facts, code


def public_environment() -> dict[str, Any]:
    """:func:`environment` without paths of this machine: a report gets published."""
    facts = environment()
    if facts["compiler"]:
        facts["compiler"] = facts["compiler"].partition(": ")[2]
    return facts


class _Run:
    def __init__(self, report: Report, options: Options, parts: tuple[str, ...], program: Sequence[str]) -> None:
        self.report, self.options = report, options
        self.begin = time.monotonic()
        self.jobs = make_plan(options, parts)
        if not has_vllm():
            self.jobs = [job for job in self.jobs if job.part != "engine"]
            if "engine" in parts:
                result = Result(part="engine", name="vLLM", status=NOT_RUN, reason="vLLM is not installed")
                self.report.results.append(result)
        self.runner = Runner(
            options,
            logs=report.folder / "logs",
            deadline=self.begin + report.limit_s - CLOSING_S,
            on_result=self.add,
            on_group=self.save,
            program=program,
        )
        self.printed = 0
        self.validated: list[str] | None = None

    def run(self) -> None:
        """Run all jobs. The report is written whatever happens, also at Ctrl-C."""
        try:
            self.save()
            self.runner.run(self.jobs)
            self.report.is_complete = True
        finally:
            self.save()
            print(f"{self.report.summary()}; report: {self.report.folder}", file=sys.stderr)

    def add(self, result: Result) -> None:
        """Keep a result; print it if it failed."""
        self.report.results.append(result)
        if result.status == FAILED:
            print(f"FAILED {result.name}: {result.reason}", file=sys.stderr)

    def save(self) -> None:
        """Write the report, and the validation record once its checks are done."""
        self.report.seconds = time.monotonic() - self.begin
        self.report.write()
        self._write_validation()
        for part in dict.fromkeys(result.part for result in self.report.results[self.printed :]):
            new = [result for result in self.report.results[self.printed :] if result.part == part]
            counts = [f"{sum(r.status == status for r in new)} {status}" for status in (PASSED, FAILED, NOT_RUN, DONE)]
            print(f"{self.report.seconds:4.0f} s  {part}: {', '.join(counts)}", file=sys.stderr)
        self.printed = len(self.report.results)

    def _write_validation(self) -> None:
        """As ``tomoe doctor`` does: the shared layout needs it, so the engines that follow do.

        Written once all kernels of the first layer were checked in its first dtype, and again if more failed later.
        """
        first = first_kernels(self.jobs)
        made = {result.name: result for result in self.report.results if result.status != NOT_RUN}
        if self.options.interpret or not first or not first <= made.keys():
            return
        failures = [f"{r.name}: {r.reason}" for r in made.values() if r.part == "kernels" and r.status == FAILED]
        if failures != self.validated:
            write_validation(device_name(), failures)
            self.validated = failures


def first_kernels(jobs: list[Job]) -> set[str]:
    """Names of the checks of the first layer in its first dtype."""
    kernels = [job for job in jobs if job.kind == "kernel"]
    keys = ("layer", "dtype")
    return {job.name for job in kernels if all(job.arguments[k] == kernels[0].arguments[k] for k in keys)}
