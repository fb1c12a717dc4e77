"""What a result came from: versions, machine, command line, time."""

import datetime
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from tomoe_vllm import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors")


def provenance() -> dict:
    """A JSON-ready record to lie beside an output. Holds no paths but those of the command line."""
    versions = {"tomoe-vllm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["tomoe", *sys.argv[1:]],
        "versions": versions,
        "machine": platform.machine(),
    }
