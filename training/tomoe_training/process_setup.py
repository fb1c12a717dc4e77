"""Settings of the process: memory allocation on CPUs, and the output of libraries."""

import contextlib
import ctypes
import os
import sys


def tune_malloc() -> None:
    """Make glibc keep freed memory of large tensors for later allocations.

    By default every large activation is mapped and unmapped, and page faults take half of a training step's
    time. MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ have the same effect, but cannot switch trimming off:
    a step that frees more than their maximum of 2 GB is trimmed.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, -1)  # never
    except (OSError, AttributeError):  # not glibc
        return


def release_memory() -> None:
    """Return free memory to the system: called once, after a step that needs much more memory than later ones.

    After :func:`tune_malloc` freed memory is otherwise kept.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def is_first_process() -> bool:
    """Whether this is rank 0 of torchrun's processes, or the only process. Needs no process group."""
    return os.environ.get("RANK", "0") == "0"


def hide_progress_bars() -> None:
    """Switch off the progress bars of transformers. (With TQDM_DISABLE vLLM would divide by zero.)"""
    from transformers.utils import logging

    logging.disable_progress_bar()


def prepare_process() -> None:
    """Settings of every ``tomoe`` command: memory allocation, and less output of libraries."""
    tune_malloc()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Worker processes of vLLM inherit these.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str((1 << 31) - 1))
