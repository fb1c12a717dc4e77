"""Compiles the C++ kernels (``kernels/**/op.cpp`` and their headers) into one library on first use, and loads it.

The sources use PyTorch's stable ABI only: compiling takes seconds rather than minutes, and they compile against any
supported torch. The library is not shared between torch versions: it is kept in ``cache_folder()`` under a hash of the
sources, the compiler, the flags and torch's version, so a stale one is never loaded. Without a compiler one warning is
logged, and every op keeps its plain-torch implementation.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from tomoe_vllm.kernels import ops  # noqa: F401  (it defines the ops that the library implements)
from tomoe_vllm.kernels.cache import cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi"),  # psabi: vectors wider than the ISA's are never passed between functions
)
ISA_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""By torch's name for the CPU's capability; other CPUs use the compiler's portable vectors."""


class BuildError(RuntimeError):
    """The library could not be built; the message is one line."""


def compiler() -> str | None:
    """Path of the C++ compiler: ``CXX``, or g++ or c++ on the path; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def build(isa: str | None = None) -> Path:
    """Path of the library for ``isa`` (default: this CPU's), compiled unless it is in the cache.

    Safe to call from several processes: one compiles, the others wait.

    Raises :class:`BuildError` if there is no compiler, if it fails, or if the cache folder cannot be written.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler was found (install g++, or set CXX)")
    flags = flags_of(isa)
    sources = sorted(SOURCES.rglob("op.cpp"))
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(" ".join([version, torch.__version__, *flags]).encode())
    for file in [*sorted(SOURCES.rglob("*.h")), *sources]:
        key.update(file.read_bytes())
    folder = cache_folder()
    library = folder / f"kernels-{key.hexdigest()[:16]}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                compile_library(cxx, flags, sources, library)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written ({error}); set TOMOE_CACHE_ROOT to a folder that can") from error
    return library


def flags_of(isa: str | None = None) -> list[str]:
    """The compiler's flags for ``isa`` (default: this CPU's)."""
    return [*FLAGS, *ISA_FLAGS.get(isa or torch.backends.cpu.get_cpu_capability(), ())]


def compile_library(cxx: str, flags: list[str], sources: list[Path], library: Path) -> None:
    """Compile ``sources`` into ``library``, which is replaced atomically.

    Raises :class:`BuildError` with the compiler's first error.
    """
    torch_folder = Path(torch.__file__).parent
    # torch's OpenMP runtime has the same name as the compiler's and is loaded already, so both use its threads.
    links = ["-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        target = Path(folder) / library.name
        command = [cxx, *flags, *map(str, sources), *links, "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error:" in line] or [
                f"exit code {result.returncode}"
            ]
            raise BuildError(f"{cxx} failed: {lines[0].strip()}")
        target.replace(library)


@cache
def load() -> bool:
    """Register the C++ implementations of the ops for CPU tensors. Returns whether that worked; if not, warns once."""
    try:
        torch.ops.load_library(build())
    except (BuildError, OSError) as error:
        logger.warning("ToMoE runs its CPU ops in plain torch, which is slower: %s", error)
        return False
    return True
