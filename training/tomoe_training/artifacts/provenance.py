"""Provenance of a result: versions, git commit, machine, command line and time."""

import datetime
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tomoe_vllm import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors")


def provenance() -> dict:
    """A JSON-ready record to store beside an output.

    Paths are reduced to their last part, because results get published. ``git`` is None outside a checkout.
    """
    versions = {"tomoe-vllm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["tomoe", *(Path(argument).name if "/" in argument else argument for argument in sys.argv[1:])],
        "versions": versions,
        "git": git_state(Path(__file__)),
        "machine": platform.machine(),
    }


def git_state(file: Path) -> dict[str, str | bool] | None:
    """Commit of the checkout that tracks ``file``, and whether tracked files differ from it.

    None where git is missing or does not track the file: an installed package may be inside another repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        is_dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "is_dirty": is_dirty}
    except (OSError, subprocess.SubprocessError):
        return None
