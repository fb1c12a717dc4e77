"""Whether the NVIDIA driver of this machine is new enough for the CUDA version of a build.

vLLM 0.32 and torch 2.13 from the package index are builds for CUDA 13. On an older driver they install without an
error, and ``torch.cuda.is_available()`` is then False. ``python -m tomoe_vllm.diagnostics.driver`` tells before
anything is installed; for that this module imports the standard library only. It prints one line, and its exit code is
1 only for a driver that is too old: without a GPU there is nothing to check. With ``--torch``, after an installation,
the exit code is 1 if nvidia-smi lists a GPU that torch does not find.
"""

import re
import subprocess
import sys
from dataclasses import dataclass

CUDA_OF_WHEELS = "13.0"
"""What the wheels of constraints.txt for GPUs are built for."""
OLDEST_DRIVERS = {12: "525.60.13", 13: "580.65.06"}
"""The oldest Linux driver of each CUDA major version. Minor versions run on the drivers of their major version
(NVIDIA, "CUDA Compatibility")."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """What nvidia-smi reports. ``cuda``: the version of the CUDA library of the driver, or None if it is not shown.

    With NVIDIA's forward-compatibility package ``cuda`` is newer than the driver itself.
    """

    gpus: tuple[str, ...]
    version: str
    cuda: str | None

    @property
    def gpu(self) -> str:
        """The GPUs in words: "NVIDIA H200", or "8 x NVIDIA H200"."""
        names = list(dict.fromkeys(self.gpus))
        return " and ".join(f"{n} x {name}" if (n := self.gpus.count(name)) > 1 else name for name in names)


def parse(query: str, table: str) -> Driver | None:
    """The driver, from the output of nvidia-smi; None if it lists no GPU.

    ``query``: of ``--query-gpu=name,driver_version --format=csv,noheader``. ``table``: of nvidia-smi without arguments,
    which alone shows the CUDA version ("CUDA Version", from driver 610 on "CUDA UMD Version").
    """
    rows = [line.rpartition(",") for line in query.splitlines()]
    gpus = [
        (name.strip(), version.strip()) for name, _, version in rows if re.fullmatch(r"\d+(\.\d+)+", version.strip())
    ]
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+\.\d+)", table)
    if not gpus:
        return None
    return Driver(gpus=tuple(name for name, _ in gpus), version=gpus[0][1], cuda=cuda.group(1) if cuda else None)


def installed_driver() -> Driver | None:
    """Ask nvidia-smi. None if there is none, if it fails, or if it finds no GPU."""

    def nvidia_smi(*arguments: str) -> str:
        result = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
        return "" if result.returncode else result.stdout

    try:
        return parse(nvidia_smi("--query-gpu=name,driver_version", "--format=csv,noheader"), nvidia_smi())
    except (OSError, subprocess.TimeoutExpired):
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def is_too_old(driver: Driver, cuda: str = CUDA_OF_WHEELS) -> bool:
    """Whether builds for this CUDA version cannot run. False for a CUDA version whose oldest driver is unknown."""
    major = _numbers(cuda)[0]
    if major not in OLDEST_DRIVERS or (driver.cuda is not None and _numbers(driver.cuda)[0] >= major):
        return False
    return _numbers(driver.version) < _numbers(OLDEST_DRIVERS[major])


def why_no_cuda(driver: Driver | None, torch_version: str, torch_cuda: str | None) -> str | None:
    """One line on why torch finds no GPU although nvidia-smi lists one; None if it lists none.

    ``torch_cuda``: ``torch.version.cuda``, None for a build without CUDA.
    """
    if driver is None:
        return None
    found = f"nvidia-smi lists {driver.gpu} (driver {driver.version}), but torch {torch_version}"
    if torch_cuda is None:
        return f"{found} is a build without CUDA: install the one for GPUs, in a new environment"
    if is_too_old(driver, torch_cuda):
        needed = OLDEST_DRIVERS[_numbers(torch_cuda)[0]]
        return (
            f"{found} is built for CUDA {torch_cuda}, which needs driver {needed} or newer: "
            "update the driver, or install a build of torch for an older CUDA"
        )
    return f"{found} (CUDA {torch_cuda}) finds no GPU: check CUDA_VISIBLE_DEVICES, and --gpus all of a container"


def check_torch() -> int:
    """Print one line about what torch finds; 1 if nvidia-smi lists a GPU and torch finds none."""
    import torch

    if torch.cuda.is_available():
        print(f"torch {torch.__version__} finds {torch.cuda.get_device_name()}")
        return 0
    reason = why_no_cuda(installed_driver(), torch.__version__, torch.version.cuda)
    print(reason or "no NVIDIA GPU found by nvidia-smi, and none by torch", file=sys.stderr if reason else sys.stdout)
    return 1 if reason else 0


def main() -> int:
    """Print one line about this machine; 1 if its driver is too old for :data:`CUDA_OF_WHEELS`."""
    driver = installed_driver()
    if driver is None:
        print("no NVIDIA GPU found by nvidia-smi: no driver to check")
        return 0
    found = f"{driver.gpu}, driver {driver.version}"
    needed = OLDEST_DRIVERS[_numbers(CUDA_OF_WHEELS)[0]]
    if is_too_old(driver):
        print(
            f"{found}: too old. vLLM and torch from the package index are built for CUDA {CUDA_OF_WHEELS}, which needs "
            f"driver {needed} or newer. Update the driver; for a CPU installation run: make install EXTRA=cpu",
            file=sys.stderr,
        )
        return 1
    print(f"{found}: new enough for CUDA {CUDA_OF_WHEELS} (driver {needed} or newer)")
    return 0


if __name__ == "__main__":
    sys.exit(check_torch() if sys.argv[1:] == ["--torch"] else main())
