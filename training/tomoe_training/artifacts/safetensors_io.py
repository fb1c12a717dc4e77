"""Safetensors files of dense models, adapters and checkpoints: which they are, what they hold, fingerprints, writing.

A dense model is identified by the :func:`fingerprint` of its tensors, which does not depend on sharding. Data is read
in pieces with plain reads, not mapped: memory stays small for a model of any size.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tomoe_training.artifacts.atomic import umask

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
OTHER_FORMATS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
CHUNK_BYTES = 8 << 20
"""Bytes that are read at once: larger reads were not faster."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. ``dtype`` is the format's own name, such as ``BF16``."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Position of its first byte in the file."""
    num_bytes: int


# ------------------------------------------------------------------------------------------- which files
def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model of a folder: those that transformers loads.

    These are the file that config.json names (``transformers_weights``), else ``model.safetensors``, else the shards of
    the index. Raises ``FileNotFoundError`` for missing files, ``ValueError`` for a damaged index and where an index
    beside ``model.safetensors`` names other files: other programs would load those.
    """
    config = read_config(folder)
    explicit = config.get("transformers_weights")
    if explicit is not None:
        return (
            _listed(folder, explicit) if explicit.endswith(".json") else [_named_file(folder, explicit, "config.json")]
        )
    file, index = folder / FILE_NAME, folder / INDEX_NAME
    if not file.is_file():
        if index.is_file():
            return _listed(folder, INDEX_NAME)
        raise FileNotFoundError(_why_no_weights(folder))
    if index.is_file() and (others := sorted(set(_weight_map(index).values()) - {FILE_NAME})):
        raise ValueError(
            f"{folder} holds two models: {FILE_NAME}, and {INDEX_NAME} for {others[0]}"
            f"{' and others' if len(others) > 1 else ''}; remove the one that is out of date"
        )
    return [file]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ``FileNotFoundError`` without one, ``ValueError`` for a damaged one."""
    file = folder / "config.json"
    if not file.is_file():
        hint = " (a PEFT adapter? Merge it into its model first)" if (folder / "adapter_config.json").is_file() else ""
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return config


def _listed(folder: Path, index_name: str) -> list[Path]:
    names = sorted(set(_weight_map(folder / index_name).values()))
    return [_named_file(folder, name, "index") for name in names]


def _named_file(folder: Path, name: str, source: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"the {source} of {folder} names {name!r}, which is not a file of this folder")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} lacks the shard {name} that its {source} names; download it again")
    return folder / name


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{index} is damaged: download or export it again") from error
    return weight_map


def _why_no_weights(folder: Path) -> str:
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    others = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FORMATS)
    if found:
        return (
            f"{folder} has no {FILE_NAME} and no {INDEX_NAME}, which would say whether {found[0]} is the model: rename "
            "it, or download the folder again"
        )
    if others:
        return (
            f"{folder} has no .safetensors file, only {others[0]}: load the model with transformers and "
            "save_pretrained it in another folder"
        )
    return f"{folder} has no .safetensors file: it has no weights; download the model again"


# ------------------------------------------------------------------------------------------- what they hold
def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, by name, without reading their data.

    Raises ``ValueError`` for a truncated or damaged file: safetensors checks dtypes, sizes and offsets.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a valid safetensors file ({error}): download or export it again") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}


def _stored(file: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors in the :func:`weight_files` of a folder, by name.

    Raises ``FileNotFoundError`` for a missing config, file or shard, ``ValueError`` for a damaged file, a tensor that
    is not where the index says, and one that occurs in two files of the folder.
    """
    files = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ValueError(
                    f"{folder} holds {name} twice, in {tensors[name].file.name} and {file.name}; remove the file that "
                    "is out of date, or download the model again"
                )
            tensors[name] = tensor
    _check_index(folder, files, tensors)
    _check_other_files(folder, files, tensors)
    return tensors


def _check_index(folder: Path, files: list[Path], tensors: dict[str, StoredTensor]) -> None:
    """Raise ``ValueError`` if a tensor is in another file than the index says: the shards are of two models."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return
    for name, file_name in _weight_map(index).items():
        held = tensors.get(name)
        if folder / file_name in files and held is not None and held.file.name != file_name:
            raise ValueError(
                f"{index} says that {name} is in {file_name}, and {held.file.name} holds it: index and files are of "
                "two models; download or save the model again"
            )


def _check_other_files(folder: Path, files: list[Path], tensors: dict[str, StoredTensor]) -> None:
    """Raise ``ValueError`` if a file that transformers does not load holds tensors of the same names.

    Other programs load every .safetensors file of a folder without an index.
    """
    for file in sorted(set(folder.glob("*.safetensors")) - set(files)):
        try:
            shared = tensors.keys() & read_header(file).keys()
        except ValueError:  # damaged, and not of the model
            continue
        if shared:
            raise ValueError(
                f"{folder} holds {min(shared)} twice: in {tensors[min(shared)].file.name}, which transformers loads, "
                f"and in {file.name}; move {file.name} out of the folder, or replace the former by it"
            )


# ------------------------------------------------------------------------------------------- data
def read_bytes(tensor: StoredTensor) -> Iterator[bytes]:
    """The stored bytes of a tensor, in pieces."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        left = tensor.num_bytes
        while left:
            piece = stream.read(min(left, CHUNK_BYTES))
            if not piece:
                raise OSError(f"{tensor.file} has become shorter while it was read")
            left -= len(piece)
            yield piece


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
        for piece in read_bytes(stored):
            digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def copy_tensors(tensors: dict[str, StoredTensor], file: Path) -> None:
    """Write stored tensors to a new safetensors file, under the names of the dict, byte for byte."""
    # Wide elements first: a tensor starts at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -_element_bytes(item[1]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        end = position + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.writelines(read_bytes(tensor))


def _element_bytes(tensor: StoredTensor) -> int:
    return tensor.num_bytes // max(1, math.prod(tensor.shape))


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Save contiguous CPU tensors as safetensors. Raises ``OSError`` where the file cannot be written."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # raised for a full disk, too
        raise OSError(f"{file} cannot be written: {error}") from error
    file.chmod(0o666 & ~umask())  # safetensors creates files that only their owner can read
