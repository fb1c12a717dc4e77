"""What a result came from: versions, machine, command line, time."""

import datetime
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tomoe_vllm import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors")


def provenance() -> dict:
    """A JSON-ready record to lie beside an output. Of paths it keeps the last part only: results get published."""
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
        "machine": platform.machine(),
    }
