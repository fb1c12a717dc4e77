"""What ``tomoe doctor`` found about the Triton kernels on one kind of GPU, kept for the layer to obey.

The layer calls :func:`read_verdict` once per process, where it chooses its layout:

    None                never checked, or the kernels, Triton or torch changed since: masked path only
    verdict.agrees      gather and grouped may be used
    not verdict.agrees  the shared layout is refused; ``verdict.failures`` says why

One JSON file per kind of GPU, where the compiled kernels are kept (``kernels/cache.py``).
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tomoe_vllm.kernels.cache import cache_folder

_KERNELS = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """``device``: torch's name of the GPU; ``kernels``: :func:`kernel_digest` of what was checked."""

    device: str
    agrees: bool
    failures: list[str]
    kernels: str


@cache
def kernel_digest() -> str:
    """Changes whenever a verdict may: digest of the kernels' sources and the versions of Triton and torch."""
    digest = hashlib.sha256()
    for file in sorted([*_KERNELS.glob("*/triton.py"), *_KERNELS.glob("*/triton/*.py")]):
        digest.update(file.read_bytes())
    for package in ("triton", "torch"):
        try:
            digest.update(f"{package} {version(package)}".encode())
        except PackageNotFoundError:
            digest.update(f"no {package}".encode())
    return digest.hexdigest()[:16]


def verdict_file(device: str) -> Path:
    """Where the verdict about ``device`` (torch's name, "NVIDIA A100-SXM4-80GB") is kept."""
    return cache_folder() / f"doctor-{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"


def write_verdict(device: str, failures: list[str]) -> Path:
    """Keep the result of a check of the present kernels; returns the file. No failure: they agree."""
    verdict = Verdict(device=device, agrees=not failures, failures=failures, kernels=kernel_digest())
    file = verdict_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(asdict(verdict), indent=1) + "\n")
    unfinished.replace(file)
    return file


def read_verdict(device: str) -> Verdict | None:
    """The verdict about ``device``; None if there is none that is valid for the present kernels."""
    try:
        verdict = Verdict(**json.loads(verdict_file(device).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return verdict if verdict.kernels == kernel_digest() else None
