"""Is there room for the weights? Asked before the engine starts: an engine that is killed says nothing."""

import contextlib
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files of control groups, version 2 and 1: most bytes, bytes in use."""


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take: the machine's or its control group's, whichever are fewer."""
    free = [psutil.virtual_memory().available]
    for most, used in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            free.append(int((cgroup / most).read_text()) - int((cgroup / used).read_text()))
    return min(free)


def require_memory(checkpoint: Path, needed: int, available: int) -> None:
    """Raise ``ValueError`` unless ``needed`` bytes of weights fit on each device."""
    if needed > available:
        raise ValueError(
            f"{checkpoint} needs {needed / 2**30:.1f} GiB for its weights on each device, {available / 2**30:.1f} GiB "
            "are free: use a larger machine, a smaller --dtype or more devices (-- --tensor-parallel-size N)"
        )
