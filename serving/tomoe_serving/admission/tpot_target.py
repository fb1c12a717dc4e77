"""Whether one more sequence can start without breaking the target for the time per output token (TPOT).

Three conditions, for a sequence that would run beside others:

- The KV cache holds its prompt and its token limit beside those of all running sequences, so none is preempted.
- A decode step with it stays within the target, by the measured step times multiplied by the slowdown.
- The token bucket of prefill time holds the time of its prefill. Let n sequences decode in D(n) ms a step. In T ms, of
  which P ms are prefill, they take (T - P) / D(n) steps, so the mean time per token T D(n) / (T - P) stays within the
  target S if P <= T (1 - D(n) / S). The bucket refills at the rate 1 - D(n) / S.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tomoe_serving.admission.bucket import PrefillBucket
from tomoe_serving.admission.slots import Slot, SlotPool
from tomoe_serving.admission.slowdown import SlowdownEstimator
from tomoe_serving.admission.step_time import StepTimes

TARGET_SHARE = 0.8
"""Share of the SLO that admission aims at. Requests differ, and nearly all of them must stay within the SLO."""

BUCKET_STEPS = 4.0
"""Capacity of the bucket in steps of the target: how much prefill may come in one burst."""


@dataclass(eq=False)
class TpotTarget:
    """The conditions of the module over the slots in use.

    Attributes:
        times: measured step times.
        slo_ms: what the mean time per output token of each request must stay within.
        slots: the slots in use.
        clock: seconds.
    """

    times: StepTimes
    slo_ms: float
    slots: SlotPool
    clock: Callable[[], float]
    slowdown: SlowdownEstimator = field(default_factory=SlowdownEstimator)
    bucket: PrefillBucket = field(init=False)

    def __post_init__(self) -> None:
        self.target_ms = TARGET_SHARE * self.slo_ms
        self.bucket = PrefillBucket(BUCKET_STEPS * self.target_ms, self.clock())

    def fits(self, slot: Slot) -> bool:
        """Whether the three conditions hold, with the bucket as it was last refilled."""
        return (
            self.slots.fits_cache(slot)
            and self.slowdown.factor * self._measured_ms(slot) <= self.target_ms
            and self.bucket.missing_ms(self._prefill_ms(slot)) <= 0
        )

    def refill(self) -> None:
        """Bring the bucket up to now; to be called before the slots in use change."""
        self.bucket.refill(self.clock(), self._refill_rate())

    def start(self, slot: Slot) -> None:
        """Spend the prefill of a slot; to be called before it is added to the slots in use."""
        if not self.slots.is_empty:
            self.bucket.spend(self._prefill_ms(slot))

    def seconds_until(self, slot: Slot) -> float | None:
        """Time until the bucket holds the prefill of a slot; ``None`` if the slot waits for something else."""
        missing_ms, rate = self.bucket.missing_ms(self._prefill_ms(slot)), self._refill_rate()
        return max(0.001, missing_ms / rate / 1000) if missing_ms > 0 and rate > 0 else None

    def observe(self, slot: Slot, tokens: int, now: float) -> None:
        """Update the slowdown; to be called before the new tokens of a slot, which came at ``now``, are counted."""
        if slot.tokens and tokens > 0:
            self.slowdown.observe(1000 * (now - slot.last_arrival) * slot.sequences / tokens, self._measured_ms())

    def _measured_ms(self, newcomer: Slot | None = None) -> float:
        """Measured time of a decode step of all slots in use, and of one more."""
        sequences, context = (newcomer.sequences, newcomer.mean_context) if newcomer else (0, 0.0)
        return self.times.decode_ms(self.slots.running + sequences, self.slots.context + context)

    def _prefill_ms(self, slot: Slot) -> float:
        return self.slowdown.factor * self.times.prefill_ms(slot.prompt_tokens)

    def _refill_rate(self) -> float:
        if self.slots.is_empty:
            return 1.0
        return max(0.0, 1 - self.slowdown.factor * self._measured_ms() / self.target_ms)
