"""Results of ``tomoe doctor --full``, and the files they are written to."""

import datetime
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tomoe_vllm.diagnostics.full.page import render

PASSED, FAILED, NOT_RUN, DONE = "passed", "failed", "not run", "done"
"""Status of a result. ``DONE``: what other checks need, such as the rates of the device; it checks nothing itself."""
JSON_NAME, PAGE_NAME, LOGS_NAME = "report.json", "report.md", "logs"


class NotRunError(Exception):
    """A check that cannot be made here; the message says why."""


@dataclass(kw_only=True, slots=True)
class Result:
    """One check. ``reason``: why it failed or was not run; ``values``: what was measured, JSON-ready."""

    part: str
    name: str
    status: str
    reason: str | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Report:
    """Everything that ``report.json`` holds. ``limit_s``: the time limit; ``is_complete``: False while checks run."""

    folder: Path
    command: str
    environment: dict[str, Any]
    is_interpreted: bool
    limit_s: float
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    is_complete: bool = False
    results: list[Result] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Number of results with this status."""
        return Counter(result.status for result in self.results)[status]

    def summary(self) -> str:
        """ "12 checks, 1 failed, 3 not run": a check that was not run is none of the 12."""
        passed, failed, not_run = (self.count(status) for status in (PASSED, FAILED, NOT_RUN))
        return f"{passed + failed} checks, {failed} failed" + (f", {not_run} not run" if not_run else "")

    def as_json(self) -> dict[str, Any]:
        """JSON-ready, without the folder."""
        facts = {name: _finite(value) for name, value in asdict(self).items() if name != "folder"}
        return {"report": "tomoe doctor --full", "summary": self.summary()} | facts

    def write(self) -> None:
        """Write both files, each atomically."""
        facts = self.as_json()
        _replace(self.folder / JSON_NAME, json.dumps(facts, indent=1) + "\n")
        _replace(self.folder / PAGE_NAME, render(facts))


def _finite(value: Any) -> Any:
    """The same with infinities and NaN, which JSON does not have, as text."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(folder: Path) -> None:
    """Create the folder of a report. Raises ``ValueError`` if it exists, ``OSError`` if it cannot be written."""
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"--out {folder} already exists; use a new folder")
    try:
        (folder / LOGS_NAME).mkdir(parents=True)
    except OSError as error:
        raise OSError(f"--out {folder} cannot be written: {error.strerror}") from error


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
    unfinished.write_text(text)
    unfinished.replace(file)
