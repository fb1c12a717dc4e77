"""Import the server and the vLLM model, and parse the engine's flags, on the Python source of another vLLM release.

    python -m tomoe_vllm.compat.import_check FOLDER          (FOLDER holds vllm/, see compat/releases.py)

The folder goes to the front of ``sys.path``, so ``vllm`` comes from there and not from the installed release. The
source has no compiled extensions; nothing is put in their place, since vLLM itself imports them only where they exist.
torch, transformers and all else are the installed ones, and the platform is that of the installed release (a CPU).
"""

import importlib
import os
import pkgutil
import sys
from pathlib import Path

MODULES = ("tomoe_vllm.plugin", "tomoe_vllm.models.tomoe", "tomoe_vllm.observability.worker_extension")


def import_all(folder: Path) -> str:
    """Import everything; returns one line that says what was imported. Raises what the first failure raises."""
    sys.path.insert(0, str(folder))
    import vllm

    if not Path(vllm.__file__).is_relative_to(folder):
        raise ImportError(f"vllm was imported from {vllm.__file__} and not from {folder}")
    serving = importlib.import_module("tomoe_serving")
    names = [module.name for module in pkgutil.walk_packages(serving.__path__, "tomoe_serving.")]
    for name in (*names, *MODULES):
        importlib.import_module(name)
    parse_flags(folder)
    return f"imported {len(names)} modules of tomoe_serving and {', '.join(MODULES)} on vllm {vllm.__version__}"


def parse_flags(checkpoint: Path) -> None:
    """Let vLLM parse all flags that the server may pass. ``checkpoint`` is not read."""
    engine, experts, settings, step_time = (
        importlib.import_module(f"tomoe_serving.{name}")
        for name in ("server.engine", "api.experts", "server.settings", "admission.step_time")
    )
    options = settings.ServerSettings(checkpoint=checkpoint, log_prompts=True)
    engine.parse_engine_args(options, experts.ENGINE_ARGUMENTS, step_time.Limits(4, 2048))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print(import_all(Path(sys.argv[1]).resolve()))
