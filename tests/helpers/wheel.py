"""The wheel in a virtual environment of its own, as a user would install it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build_wheel(folder: Path) -> Path:
    """Build this tree's wheel into ``folder``."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path, *, extras: str = "cpu", python: str = sys.executable) -> Path:
    """bin/ of a new virtual environment ``folder`` of ``python`` with the wheel and its ``extras`` (two minutes)."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    own = folder / "bin" / "python"
    for command in (
        ["-m", "pip", "install", "--quiet", "--upgrade", "pip>=26"],
        ["-m", "pip", "install", "--quiet", f"{wheel}[{extras}]"],
        ["-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"],
        ["-m", "tomoe_vllm.compat.vllm_cpu_shim"],
    ):
        subprocess.run([own, *command], check=True, cwd=folder)
    return own.parent
