"""The folder that keeps what is made once per machine: compiled kernels, tuned thresholds, validation records."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``TOMOE_CACHE_ROOT``, or ``tomoe_vllm`` in ``XDG_CACHE_HOME`` (default ``~/.cache``). It may not exist yet."""
    root = os.environ.get("TOMOE_CACHE_ROOT") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tomoe_vllm"
    return Path(root).expanduser()
