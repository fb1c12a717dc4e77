"""How PyTorch is made to run well on this machine's CPU."""

import contextlib
import ctypes
import os
import sys


def tune_malloc() -> None:
    """Let glibc keep freed memory for large tensors.

    With the defaults every large activation is mapped and unmapped anew, and page faults take half of a
    training step's time. Same as MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_, but set from inside, where
    trimming can be switched off: a step that frees more than a threshold of 2 GB would pay for it again.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, -1)  # never
    except (OSError, AttributeError):  # another C library has other habits
        return


def release_memory() -> None:
    """Give what is free back to the system: once, after a step that needed much more than all later ones.

    :func:`tune_malloc` keeps freed memory otherwise, for good.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def hide_progress_bars() -> None:
    """Switch off transformers' own progress bars. (TQDM_DISABLE would reach vLLM, which divides by its bar's time.)"""
    from transformers.utils import logging

    logging.disable_progress_bar()


def prepare_process() -> None:
    """Settings for every ``tomoe`` command: malloc for the CPU, and no chatter from libraries."""
    tune_malloc()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Inherited by vLLM's worker processes, which start with their own malloc.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str((1 << 31) - 1))
