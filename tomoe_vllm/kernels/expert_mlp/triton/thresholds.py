"""Where the op changes its way through the weights on a GPU: a small table per device, like vLLM's MoE configs.

``<device name>.json`` in the folder ``TOMOE_TUNED_CONFIG_FOLDER`` names, or else in the kernels' cache, where `tomoe
tune` writes; or in ``configs/`` beside this file. ``configs/default.json``, for a device that was not measured, takes
the masked way for every number of tokens. The CPU version goes by the tokens of each expert, alike on every machine.
"""

import json
import os
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

from tomoe_vllm.kernels.cache import cache_folder

SHIPPED_FOLDER = Path(__file__).parent / "configs"
FOLDER_VARIABLE = "TOMOE_TUNED_CONFIG_FOLDER"


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """``gather_tokens``: up to so many tokens (0: never) each token's rows are gathered; ``grouped_tokens``: from so
    many on tokens are grouped by expert; the masked way between them.
    """

    gather_tokens: int
    grouped_tokens: int

    def path(self, num_tokens: int) -> str:
        """ "gather", "dense" or "grouped": the execution path for a step of ``num_tokens``."""
        if num_tokens <= self.gather_tokens:
            return "gather"
        return "grouped" if num_tokens >= self.grouped_tokens else "dense"


def device_name() -> str:
    """This GPU's name, or ``cpu``, as a file name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def tuned_folder() -> Path:
    """Where `tomoe tune` writes its table, and where it is read."""
    return Path(os.environ.get(FOLDER_VARIABLE) or cache_folder() / "tuned")


@cache
def load_thresholds() -> Thresholds:
    """The table of this device. Raises ``ValueError`` for a file with other keys than those of Thresholds."""
    candidates = [folder / f"{device_name()}.json" for folder in (tuned_folder(), SHIPPED_FOLDER)]
    file = next((file for file in candidates if file.exists()), SHIPPED_FOLDER / "default.json")
    values = json.loads(file.read_text())
    names = [field.name for field in fields(Thresholds)]
    if sorted(values) != sorted(names) or not all(isinstance(value, int) and value >= 0 for value in values.values()):
        raise ValueError(f"{file} holds {values}; it must hold {', '.join(names)}, integers from 0. Run: tomoe tune")
    return Thresholds(**values)
