"""Python in another process: one thread, this repository's packages, captured text."""

import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's environment with one thread and this repository's packages on the path."""
    packages = os.pathsep.join(str(REPOSITORY / folder) for folder in ("", "training", "serving"))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": packages} | more


def python(*arguments: object, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """Run ``python arguments`` to its end with captured text; ``env`` and ``cwd`` as in subprocess.

    After ``timeout`` seconds, or at Ctrl-C, it is killed with the processes it started: any of them may hold the pipes
    open, and in a session of its own it does not get the terminal's signal.
    """
    process = start_python(*arguments, start_new_session=True, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_python(*arguments: object, **options) -> subprocess.Popen:
    """Start ``python arguments``; the caller waits for it.

    SIGINT has its default handler there, also where this process was started in a shell's background and ignores it.
    """
    command = [sys.executable, *map(str, arguments)]
    options = {"env": environment(), "preexec_fn": restore_interrupts} | options
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def restore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
