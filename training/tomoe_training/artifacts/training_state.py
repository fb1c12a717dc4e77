"""The state that a killed training resumes from: modules, optimizer, scheduler and step, in one file."""

import os
import pickle
import zipfile
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
    """What :func:`save_state` saved, with tensors on ``device``, or None without a file.

    The checksums in the file are read first. Raises ``ValueError`` for a file that they prove to be damaged, for one of
    another version, and for a whole file that cannot be loaded. The file is kept.
    """
    if not file.is_file():
        return None
    damage = _damage(file)
    if damage:
        raise ValueError(f"{file} is damaged ({damage}); remove it to start this run again from step 0")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # version 1 held a class of this package, which weights_only refuses
        raise ValueError(
            f"{file} is whole and was written by another version of tomoe; finish the run with that version, or choose "
            "another --out"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is whole but cannot be loaded here, keep it: {error}") from error
    state = _moved(state, device)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{file} is not a training state of tomoe; choose another --out")
    if state.get("version") != VERSION:
        raise ValueError(
            f"{file} has training state version {state.get('version', 1)}, this tomoe resumes version {VERSION}: the "
            "order of batches and the noise differ. Finish the run with the version that started it, or choose another "
            "--out"
        )
    return state


def _damage(file: Path) -> str | None:
    """What is wrong with a file of torch.save, a zip archive with a CRC-32 per record; None if its bytes are right."""
    try:
        with zipfile.ZipFile(file) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OverflowError, ValueError, NotImplementedError) as error:
        return f"{error or 'it ends early'}"
    return f"the checksum of {record} is wrong" if record else None


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of a state with its tensors on ``device``. (torch.load itself does not know every device's name.)"""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return tuple(_moved(item, device) for item in value) if isinstance(value, tuple) else value
