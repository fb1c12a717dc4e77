"""The output folder of a training run: ``run/`` with config, provenance, metrics and training checkpoint.

``run/`` exists from the start of the run. The two files of the adapter appear beside it when training is over.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from tomoe_training.artifacts.adapter import ADAPTER_CONFIG
from tomoe_training.artifacts.atomic import write_json
from tomoe_training.artifacts.provenance import provenance
from tomoe_training.artifacts.training_state import load_state, save_state
from tomoe_training.config import RunConfig

MAY_CHANGE = {"log_every", "checkpoint_every", "tensorboard", "process_timeout_minutes", "notes"}
"""Settings that may differ when a run is resumed: they do not affect its result."""


def settings_of_result(config: RunConfig) -> dict[str, Any]:
    """The settings that determine the result of a run."""
    return {name: value for name, value in config.model_dump().items() if name not in MAY_CHANGE}


class RunFolder:
    """Files of the run in ``out``."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out / "run"
        self.config = self.folder / "config.yaml"
        self.metrics = self.folder / "metrics.jsonl"
        self.checkpoint = self.folder / "checkpoint.pt"
        self.self_text = self.folder / "self.jsonl"

    @property
    def has_started(self) -> bool:
        """Whether training has begun. The settings of a run that failed earlier may be corrected."""
        return self.metrics.is_file() or (self.out / ADAPTER_CONFIG).is_file()

    def summary(self) -> dict[str, Any] | None:
        """Summary of a finished run, else None."""
        file = self.out / ADAPTER_CONFIG
        return json.loads(file.read_text())["training"] if file.is_file() else None

    def check(self, config: RunConfig) -> None:
        """Raise ``ValueError`` unless ``out`` is new or holds the run of these settings."""
        if self.has_started and self.config.is_file():
            mine = settings_of_result(config)
            stored = {k: v for k, v in yaml.safe_load(self.config.read_text()).items() if k not in MAY_CHANGE}
            differing = sorted(k for k in mine.keys() | stored.keys() if mine.get(k) != stored.get(k))
            if "base" in differing and os.path.realpath(mine["base"]) == os.path.realpath(str(stored.get("base"))):
                differing.remove("base")  # another way to write the same folder
            if differing:
                k = differing[0]
                raise ValueError(
                    f"{self.out} belongs to another run ({k}: {stored.get(k)!r} there, {mine.get(k)!r} here); "
                    "choose another --out, or give the same settings to resume it"
                )
        elif not self.config.is_file() and self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} exists and is not a training run; choose another --out")

    def create(self, config: RunConfig) -> None:
        """Write config and provenance; drop the sampled text of a run that made no step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.has_started:
            self.self_text.unlink(missing_ok=True)
        self.config.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
        if not (self.folder / "provenance.json").exists():
            write_json(self.folder / "provenance.json", provenance())

    def load_checkpoint(self, base_hash: str, device: torch.device, noise_device: str | None) -> dict[str, Any] | None:
        """The training state to resume from, or None.

        Raises ``ValueError`` if it is of another base model, or had its noise from another kind of device or
        another GPU model.
        """
        state = load_state(self.checkpoint, device)
        if state is not None and state["base_hash"] != base_hash:
            raise ValueError(f"{self.checkpoint} was written for another base model")
        if state is not None and noise_device is not None:
            drawn_on = state.get("noise_device", "cpu")  # older versions have no entry, and drew all noise on the CPU
            if drawn_on != noise_device:
                raise ValueError(
                    f"{self.checkpoint} belongs to a run whose noise was drawn on {drawn_on!r}, and {noise_device!r} "
                    "draws other numbers: resume it there, or remove the file to start again from step 0"
                )
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Save a training state, with ``base_hash``."""
        save_state(state, self.checkpoint)

    def trim_metrics(self, first_step: int) -> None:
        """Drop the metrics that a killed run logged after its last checkpoint."""
        if self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]
            self.metrics.write_text("".join(line + "\n" for line in kept))

    @contextlib.contextmanager
    def metrics_writer(self, use_tensorboard: bool) -> Iterator[Callable[[int, dict[str, float]], None]]:
        """A function that appends a step's terms to metrics.jsonl, and to TensorBoard if it is installed."""
        board: Any = None
        if use_tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                board = SummaryWriter(str(self.folder / "tensorboard"))
        with self.metrics.open("a", buffering=1) as stream:

            def write(step: int, terms: dict[str, float]) -> None:
                stream.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in terms.items()}}) + "\n")
                for name, value in terms.items() if board else ():
                    board.add_scalar(name, value, step)

            yield write
        if board:
            board.close()
