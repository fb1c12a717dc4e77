"""Resolve the requirement locks of this folder: every package with its hashes, without the address of an index.

Usage: ``make lock``. Indexes are those that pip is configured to use on this machine. To install from a lock::

    pip install --require-hashes --no-deps -r requirements/cpu.txt
    pip install --no-deps --editable .
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
LOCKS = {
    "cpu": ("cpu", "serve", "train", "eval", "bench", "dev"),
    "gpu": ("gpu", "serve", "train"),
}
LEFT_OUT = {"cpu": ("torchvision", "torchaudio", "torchcodec")}
"""Their general builds break transformers' imports beside a CPU build of torch; nothing here uses them."""
PLATFORM = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")


def index_options(lock: str) -> list[str]:
    """pip's indexes on this machine, as uv's options. Local wheels are for the CPU: they hold CPU builds of torch."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = {line.partition("=")[0].partition(".")[2]: line.partition("=")[2].strip("'") for line in lines}
    names = ["index-url", "extra-index-url", *(["find-links"] if lock == "cpu" else [])]
    found = [f"--{name}={address}" for name in names for address in settings.get(name, "").split()]
    return [*found, *([f"--extra-index-url={index}"] if (index := os.environ.get("TORCH_INDEX")) else [])]


def main() -> None:
    for lock, extras in LOCKS.items():
        command = [
            Path(sys.executable).parent / "uv", "pip", "compile", "pyproject.toml", "--constraint", "constraints.txt",
            "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--quiet",
            "--index-strategy", "unsafe-best-match", *PLATFORM, *index_options(lock),
            *(f"--extra={extra}" for extra in extras),
            *(f"--no-emit-package={package}" for package in LEFT_OUT.get(lock, ())),
            "--output-file", FOLDER / f"{lock}.txt",
        ]  # fmt: skip
        # Without this the file's first lines would repeat the command, addresses included.
        subprocess.run(command, cwd=ROOT, env=os.environ | {"UV_CUSTOM_COMPILE_COMMAND": "make lock"}, check=True)


if __name__ == "__main__":
    main()
