"""Files: dense checkpoints, adapters, and folders that appear whole or not at all.

An adapter is a folder like a LoRA adapter: ``adapter_config.json`` and ``adapter.safetensors``. It names
its base model by :func:`fingerprint`, which depends on the tensors only and not on how they are sharded.
"""

import fcntl
import glob
import hashlib
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk. ``start`` and ``end`` are byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, by name, without reading their data.

    Raises ``ValueError`` if the file is truncated or its header is not one.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError
            header = json.loads(stream.read(length))
        tensors = {
            name: StoredTensor(
                file, entry["dtype"], tuple(entry["shape"]), *(8 + length + o for o in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{file} is not a valid safetensors file: download or export it again") from error
    for name, tensor in tensors.items():
        num_bytes = _ITEM_BYTES.get(tensor.dtype, 0)
        for dim in tensor.shape:
            num_bytes *= dim
        if tensor.end > size or (tensor.dtype in _ITEM_BYTES and tensor.end - tensor.start != num_bytes):
            raise ValueError(f"{file} is truncated at tensor {name}: download or export it again")
    return tensors


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name, from its safetensors files.

    Raises ``FileNotFoundError`` if there is none, ``ValueError`` for a damaged one or a missing shard.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: download or export it again") from error
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors file; convert the checkpoint to safetensors first")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {file.name} that its index names")
        tensors.update(read_safetensors_header(file))
    return tensors


def fingerprint(folder: Path) -> str:
    """Hash of a model's tensors: names, dtypes, shapes and bytes, however they are sharded.

    ``sha256:`` and 64 hex digits. Reads every byte once (about 1 GB/s).
    """
    return fingerprint_of(stored_tensors(folder))


def fingerprint_of(tensors: dict[str, StoredTensor]) -> str:
    """:func:`fingerprint` of some tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            left = tensor.end - tensor.start
            while left:
                chunk = stream.read(min(left, 1 << 24))
                digest.update(chunk)
                left -= len(chunk)
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when the block ends well, and vanishes otherwise.

    What a killed process left of an earlier attempt is removed first: each writer holds a lock on its folder.
    Raises ``ValueError`` if ``out`` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} already exists; choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{glob.escape(out.name)}.tmp-*"):
        lock = _lock_folder(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    temporary, lock = _locked_folder(out)
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A new temporary folder beside ``out`` and its lock; again if another process took it for a dead one's."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
        lock = _lock_folder(temporary)
        if lock is not None and temporary.exists():
            return temporary, lock


def _lock_folder(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed or its process ends; None if another has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def save_state(state: dict[str, Any], file: Path) -> None:
    """Save a training state so that a kill at any moment leaves the old one or the new one."""
    temporary = file.with_suffix(".tmp")  # one name: what a killed run left half-written is overwritten
    with temporary.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def load_state(file: Path, device: torch.device) -> dict[str, Any] | None:
    """What :func:`save_state` saved, or None. Raises ``ValueError`` for a damaged file, which stays."""
    if not file.is_file():
        return None
    try:
        return torch.load(file, map_location=device, weights_only=False)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged; remove it to start this run again from step 0") from error


def write_json_whole(path: Path, data: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    write_text_whole(path, json.dumps(data, indent=2) + "\n")


def write_text_whole(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Save contiguous CPU tensors as safetensors. Raises ``OSError`` where the file cannot be written."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # what a full disk is to it
        raise OSError(f"{file} cannot be written: {error}") from error
    file.chmod(0o666 & ~_umask())  # safetensors makes files that their owner alone can read


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
