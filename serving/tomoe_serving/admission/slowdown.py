"""How much slower the engine runs under real load than it did when its step times were measured."""

from dataclasses import dataclass

FIRST_FACTOR = 1.5
"""Before the first token. Real clients take CPU time that the measurement at start-up did not see."""

STEP = 0.01
"""Relative change of the factor with each observed step."""


@dataclass(eq=False)
class SlowdownEstimator:
    """Running estimate of the median ratio of real to measured step time, at least 1.

    Each observation moves the estimate by a fixed relative step, up if the real step took longer than the estimate
    predicts and down otherwise. Such an estimate settles at the median.
    """

    factor: float = FIRST_FACTOR

    def observe(self, real_ms: float, measured_ms: float) -> None:
        """Compare a real step with the measured time of a step of the same size."""
        is_slower = real_ms > self.factor * measured_ms
        self.factor = max(1.0, self.factor * (1 + STEP if is_slower else 1 - STEP))
