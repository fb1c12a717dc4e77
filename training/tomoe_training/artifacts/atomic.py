"""Atomic outputs: folders and files that appear complete or not at all."""

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``out`` when the block succeeds, and removed when it raises.

    Temporary folders of killed processes are removed first. A running process holds a lock on its own.
    Raises ``ValueError`` if ``out`` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} already exists; choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f"{glob.escape(out.name)}.tmp-*"):
        lock = _lock_folder(leftover)
        if lock is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
    temporary, lock = _create_locked_folder(out)
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _create_locked_folder(out: Path) -> tuple[Path, int]:
    """A new temporary folder beside ``out`` and its lock.

    Tries again where another process removed the folder as a leftover before it was locked.
    """
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
        lock = _lock_folder(temporary)
        if lock is not None and temporary.exists():
            return temporary, lock


def _lock_folder(folder: Path) -> int | None:
    """File descriptor that locks the folder until it is closed or the process ends; None if already locked."""
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


def write_json(path: Path, data: object) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def umask() -> int:
    """The umask of this process. (It can only be read by setting it.)"""
    mask = os.umask(0)
    os.umask(mask)
    return mask
