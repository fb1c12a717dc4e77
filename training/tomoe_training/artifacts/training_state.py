"""The state that a killed training resumes from: modules, optimizer, scheduler and step, in one file."""

import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 2
"""Raise it when the batches, the noise or the order of a run change: a resumed run must not mix two versions.

1 (without a number): seeds mixed by primes. 2: seeds by :mod:`tomoe_training.seeds`.
"""


def check_state(state: Any, step: int) -> None:
    """Raise ``FloatingPointError`` if a tensor in a state of lists and dicts after ``step`` steps is not finite."""
    flags: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors(state):
        flags.setdefault(tensor.device, []).append(tensor.isfinite().all())  # an optimizer may count steps on the CPU
    if not all(torch.stack(found).all().item() for found in flags.values()):
        raise FloatingPointError(
            f"the weights or the optimizer's state are not finite after step {step}: a gradient overflowed. The last "
            "checkpoint is kept; lower learning_rate, set max_grad_norm, or use dtype float32"
        )


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def save_state(state: dict[str, Any], file: Path) -> None:
    """Save a state of tensors, numbers, strings, lists and dicts. A kill leaves the old file or the new one."""
    temporary = file.with_suffix(".tmp")  # a fixed name: the next save overwrites what a killed run left
    with temporary.open("wb") as stream:
        torch.save({"version": VERSION, **state}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def load_state(file: Path, device: torch.device) -> dict[str, Any] | None:
    """What :func:`save_state` saved, or None without a file.

    Raises ``ValueError`` for a damaged file and for one of another version. The file is kept.
    """
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        # Version 1 held a class of this package, which weights_only refuses.
        raise ValueError(
            f"{file} is damaged or from another version of tomoe; remove it to start this run again from step 0"
        ) from error
    if state.get("version") != VERSION:
        raise ValueError(
            f"{file} has training state version {state.get('version', 1)}, this tomoe resumes version {VERSION}: the "
            "order of batches and the noise differ. Finish the run with the version that started it, or remove the "
            "file to start again from step 0"
        )
    return state
