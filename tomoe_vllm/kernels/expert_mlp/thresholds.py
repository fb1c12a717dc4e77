"""Where the op changes its way through the weights: a small table per device, like vLLM's MoE configs.

``configs/<device name>.json`` beside this file, or in the folder ``TOMOE_TUNED_CONFIG_FOLDER`` (where ``tomoe tune``
writes); ``configs/default.json`` for a device that has none.
"""

import json
import os
import platform
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

SHIPPED_FOLDER = Path(__file__).parent / "configs"
FOLDER_VARIABLE = "TOMOE_TUNED_CONFIG_FOLDER"


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """``streamed_tokens``: up to so many tokens W_down's rows are streamed, above it they are packed into blocks.
    ``group_tokens``: where they are streamed, experts of fewer tokens are computed together, on the union of their
    neurons, so that no row is read twice.
    """

    group_tokens: int
    streamed_tokens: int


def device_name() -> str:
    """This CPU's vector instructions and core count, as a file name."""
    name = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-{os.cpu_count()}-cores"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


@cache
def load_thresholds() -> Thresholds:
    """The table of this device. Raises ``ValueError`` for a file with other keys than those of Thresholds."""
    folders = [Path(os.environ[FOLDER_VARIABLE])] if os.environ.get(FOLDER_VARIABLE) else []
    candidates = [folder / f"{device_name()}.json" for folder in [*folders, SHIPPED_FOLDER]]
    file = next((file for file in candidates if file.exists()), SHIPPED_FOLDER / "default.json")
    values = json.loads(file.read_text())
    names = [field.name for field in fields(Thresholds)]
    if sorted(values) != sorted(names) or not all(isinstance(value, int) and value > 0 for value in values.values()):
        raise ValueError(f"{file} holds {values}; it must hold {', '.join(names)}, positive integers. Run: tomoe tune")
    return Thresholds(**values)
