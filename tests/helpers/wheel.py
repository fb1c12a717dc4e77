"""The wheel in a virtual environment of its own."""

import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.processes import REPOSITORY


def build_wheel(folder: Path) -> Path:
    """Build this tree's wheel into ``folder``."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_without_dependencies(wheel: Path, folder: Path) -> Path:
    """bin/ of a new virtual environment with the wheel; everything else is this environment's (four seconds)."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], check=True, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched after the wheel's, and its own .pth files, an editable install, are not read.
    (site_packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return folder / "bin"


def install_wheel(wheel: Path, folder: Path, *, extras: str = "cpu", python: str = sys.executable) -> Path:
    """bin/ of a new virtual environment ``folder`` of ``python`` with the wheel and its ``extras`` (two minutes)."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    own = folder / "bin" / "python"
    for command in (
        ["-m", "pip", "install", "--quiet", "--upgrade", "pip>=26"],
        ["-m", "pip", "install", "--quiet", "--constraint", REPOSITORY / "constraints.txt", f"{wheel}[{extras}]"],
        ["-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"],
        ["-m", "tomoe_vllm.compat.vllm_cpu_shim"],
    ):
        subprocess.run([own, *command], check=True, cwd=folder)
    return own.parent
