"""Token bucket that limits how much prefill may delay the sequences that decode."""

from dataclasses import dataclass, field


@dataclass(eq=False)
class PrefillBucket:
    """Token bucket whose tokens are milliseconds of prefill.

    The bucket refills with time, at the share of it that decoding leaves free, and every prompt spends the time of
    its prefill. A prompt that takes longer than the capacity may start once the bucket is full; it overdraws the
    bucket, so the level becomes negative and the next prompt waits longer.

    Attributes:
        capacity_ms: most prefill that can be saved up, that is the largest burst.
        refilled_at: time of the last refill, in seconds of the caller's clock.
        level_ms: prefill that may start now; starts at the capacity.
    """

    capacity_ms: float
    refilled_at: float
    level_ms: float = field(init=False)

    def __post_init__(self) -> None:
        self.fill()

    def fill(self) -> None:
        """Set the level to the capacity."""
        self.level_ms = self.capacity_ms

    def refill(self, now: float, rate: float) -> None:
        """Add what has accrued since the last refill.

        Args:
            now: seconds of the same clock as ``refilled_at``.
            rate: milliseconds of prefill per millisecond, 0 to 1.
        """
        self.level_ms = min(self.capacity_ms, self.level_ms + 1000 * (now - self.refilled_at) * rate)
        self.refilled_at = now

    def missing_ms(self, prefill_ms: float) -> float:
        """How much the level is below what a prefill of this length needs; not positive if it may start."""
        return min(prefill_ms, self.capacity_ms) - self.level_ms

    def spend(self, prefill_ms: float) -> None:
        """Take a prefill out of the bucket, even if that overdraws it."""
        self.level_ms -= prefill_ms
