"""Checks that the weights fit in memory before the engine starts. An engine killed for memory leaves no message."""

import contextlib
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""(limit, usage) files of control groups, version 2 and version 1."""


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes of host memory that this process can still allocate, within the machine and its control group."""
    free = [psutil.virtual_memory().available]
    for most, used in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            free.append(int((cgroup / most).read_text()) - int((cgroup / used).read_text()))
    return min(free)


def require_memory(checkpoint: Path, needed: int, available: int) -> None:
    """Raise ``ValueError`` unless ``needed`` bytes of weights fit on each device."""
    if needed > available:
        raise ValueError(
            f"{checkpoint} needs {needed / 2**30:.1f} GiB for its weights on each device; {available / 2**30:.1f} GiB "
            "are free: use a larger machine, a smaller --dtype or more devices (-- --tensor-parallel-size N)"
        )
