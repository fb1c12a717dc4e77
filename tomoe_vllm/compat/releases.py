"""vLLM's releases: which are supported, and their Python source.

The source of a release is unpacked from its wheel into ``vllm-source/<version>`` in the cache folder
(``TOMOE_CACHE_ROOT``, or ``~/.cache/tomoe_vllm``), 50 to 60 MB each; the wheel (up to 0.4 GB) is deleted.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tomoe_vllm.kernels.cache import cache_folder

SUPPORTED = ("0.31", "0.32", "0.33")
"""Minor releases that pyproject.toml allows."""


def source_root() -> Path:
    """Folder of all unpacked releases."""
    return cache_folder() / "vllm-source"


def version_key(version: str) -> tuple[int, ...]:
    """Order of releases: "0.33.1" -> (0, 33, 1)."""
    return tuple(map(int, version.split(".")))


def minor_of(version: str) -> str:
    """ "0.33.1" -> "0.33"."""
    return ".".join(version.split(".")[:2])


def cached_source(version: str) -> Path | None:
    """Folder that holds ``vllm/`` of a release, or None if it was not unpacked yet."""
    folder = source_root() / version
    return folder if (folder / "vllm" / "__init__.py").is_file() else None


def index_versions() -> list[str]:
    """Final releases on the package index that pip is set up with, newest first; none if it cannot be reached."""
    command = [sys.executable, "-m", "pip", "index", "versions", "vllm", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return []
    versions = [v for v in json.loads(done.stdout)["versions"] if re.fullmatch(r"\d+(\.\d+)+", v)]
    return sorted(versions, key=version_key, reverse=True)


def releases_to_check() -> tuple[list[str], list[str]]:
    """The newest release of each supported minor one, and releases on the index that are newer than all of them (the
    newest only).

    Where the index cannot be reached, releases in the cache are taken; for a minor release that is in neither, its
    name alone, such as "0.33".
    """
    on_index = index_versions()
    in_cache = [folder.name for folder in source_root().glob("*.*") if cached_source(folder.name)]
    known = on_index or sorted(in_cache, key=version_key, reverse=True)
    supported = [next((v for v in known if minor_of(v) == minor), minor) for minor in SUPPORTED]
    is_newer = bool(on_index) and version_key(on_index[0]) > version_key(supported[-1])
    return supported, on_index[:1] if is_newer else []


def fetch_source(version: str) -> Path:
    """Folder that holds ``vllm/`` of a release, downloaded by pip if it is not in the cache.

    Raises ``RuntimeError`` with pip's last line if the wheel cannot be had.
    """
    if (folder := cached_source(version)) is not None:
        return folder
    source_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=source_root()) as name:
        temporary = Path(name)
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", name]
        done = subprocess.run([sys.executable, *command, f"vllm=={version}"], capture_output=True, text=True)
        wheels = list(temporary.glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise RuntimeError(f"vllm {version} cannot be downloaded: {last}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            sources = [n for n in wheel.namelist() if n.startswith("vllm/") and n.endswith(".py")]
            wheel.extractall(temporary / "source", sources)
        folder = source_root() / version
        (temporary / "source").rename(folder)
    return folder
