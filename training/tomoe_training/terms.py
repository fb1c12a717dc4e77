"""Terms of the loss: kept on the device, and read every few steps, because reading waits for the device."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tomoe_training.ranks import mean_over_ranks


def check_finite(terms: dict[str, float], step: int) -> None:
    """Raise ``FloatingPointError`` with all terms of the loss if one of them is not finite."""
    if not all(map(math.isfinite, terms.values())):
        listed = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        raise FloatingPointError(
            f"the loss is not finite at step {step + 1}: {listed}. The last checkpoint is kept; lower "
            "learning_rate, set max_grad_norm, or use dtype float32"
        )


class TermHistory:
    """Terms of the loss of the steps since the last reading, on the device."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._steps: list[int] = []
        self._rows: list[Tensor] = []
        self._last: list[float] = []

    def add(self, step: int, names: Iterable[str], values: Tensor) -> None:
        """Keep the terms of a step (counted from 0): a vector on the device, one value for each name."""
        self._names = tuple(names)
        self._steps.append(step)
        self._rows.append(values.detach())

    def read(self) -> dict[str, float]:
        """Terms of the last step, means over the processes. Waits for the device once; all processes must call it.

        Raises ``FloatingPointError`` for the first step since the last reading whose terms are not finite.
        """
        if self._rows:
            rows = mean_over_ranks(torch.stack(self._rows)).tolist()
            for step, row in zip(self._steps, rows, strict=True):
                check_finite(dict(zip(self._names, row, strict=True)), step)
            self._last = rows[-1]
            self._steps.clear()
            self._rows.clear()
        return dict(zip(self._names, self._last, strict=True))
