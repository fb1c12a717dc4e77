"""Safetensors files of dense models, adapters and checkpoints: what they hold, fingerprints, writing.

A dense model is identified by the :func:`fingerprint` of its tensors, which does not depend on sharding.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tomoe_training.artifacts.atomic import umask

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. ``dtype`` is the format's own name, such as ``BF16``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, by name, without reading their data.

    Raises ``ValueError`` for a truncated or damaged file: safetensors checks dtypes, sizes and offsets.
    """
    try:
        with safe_open(file, framework="pt") as stream:
            return {name: _stored(file, stream, name) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a valid safetensors file ({error}): download or export it again") from error


def _stored(file: Path, stream, name: str) -> StoredTensor:
    tensor = stream.get_tensor(name)  # a view of the memory-mapped file
    return StoredTensor(file, stream.get_slice(name).get_dtype(), tuple(tensor.shape), tensor.nbytes)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name, from its safetensors files.

    Raises ``FileNotFoundError`` for a missing config, file or shard, ``ValueError`` for a damaged file.
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
        tensors.update(read_header(file))
    return tensors


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model's tensors: names, dtypes, shapes and bytes, independent of sharding.

    Returns ``sha256:`` and 64 hex digits. Reads every byte once (about 1 GB/s).
    """
    return fingerprint_of(stored_tensors(folder))


def fingerprint_of(tensors: dict[str, StoredTensor]) -> str:
    """:func:`fingerprint` of the given tensors."""
    digest = hashlib.sha256()
    for name, stored in sorted(tensors.items()):
        digest.update(f"{name}\0{stored.dtype}\0{stored.shape}\0".encode())
        with safe_open(stored.file, framework="pt") as stream:
            # The stored bytes: NumPy has no bfloat16 or float8, and two NaNs may differ.
            digest.update(stream.get_tensor(name).reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Save contiguous CPU tensors as safetensors. Raises ``OSError`` where the file cannot be written."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # raised for a full disk, too
        raise OSError(f"{file} cannot be written: {error}") from error
    file.chmod(0o666 & ~umask())  # safetensors creates files that only their owner can read
