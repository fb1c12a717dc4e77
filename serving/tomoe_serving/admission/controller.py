"""Decides when each sequence may run: slots, a bounded queue and, with an SLO, a target for the time per output token.

A request is queued (:meth:`AdmissionController.enqueue`) before vLLM handles it, or refused with 429 if the queue is
full. Each of its sequences takes a slot (:meth:`AdmissionController.slot`) before the engine sees it, in order of
arrival, and gives it back at its end. Without ``slo_ms`` a free slot is the only condition; with it those of
:class:`TpotTarget` are added.

This module does not depend on vLLM. All calls are made on one event loop.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from tomoe_serving.admission.slots import OutputMeans, QueueEntry, Slot, SlotPool
from tomoe_serving.admission.step_time import StepTimes
from tomoe_serving.admission.tpot_target import TpotTarget

GUESSED_TOKENS_PER_S = 100.0
"""Output of a server whose step times were not measured; only Retry-After depends on it."""

_current_entry: ContextVar[QueueEntry | None] = ContextVar("_current_entry", default=None)
"""Queue entry of the request that the current task serves. The middleware queues a request and vLLM's engine client
takes its slots; between them are vLLM's handlers, which pass nothing of the request on."""


class QueueFullError(Exception):
    """The queue is full; in ``retry_after_s`` seconds all that wait now will have a slot."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class AdmissionClosedError(Exception):
    """The server is stopping; no sequence gets a slot any more."""


@dataclass(eq=False)
class AdmissionController:
    """Slots and queue of one server; see the module.

    Attributes:
        max_sequences: sequences that may run at once.
        queue_size: sequences that may wait beyond the free slots.
        times: measured step times; without them Retry-After is a guess.
        slo_ms: target for the mean time per output token of each request; needs ``times``, else ``ValueError``.
        kv_capacity: tokens that the KV cache holds.
        clock: seconds.
        pending: sequences of accepted requests that do not hold a slot yet.
    """

    max_sequences: int
    queue_size: int
    times: StepTimes | None = None
    slo_ms: float | None = None
    kv_capacity: int = 1 << 62
    clock: Callable[[], float] = time.monotonic
    pending: int = 0
    is_closed: bool = False
    means: OutputMeans = field(default_factory=OutputMeans)
    _waiting: deque[tuple[Slot, asyncio.Future[None]]] = field(default_factory=deque)
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.slots = SlotPool(self.max_sequences, self.kv_capacity)
        self.target: TpotTarget | None = None
        if self.slo_ms is not None:
            if self.times is None:
                raise ValueError("an SLO needs measured step times")
            self.target = TpotTarget(self.times, self.slo_ms, self.slots, self.clock)

    @contextlib.contextmanager
    def enqueue(self, sequences: int = 1) -> Iterator[QueueEntry]:
        """Keep a request in the queue until the block ends. Raises :class:`QueueFullError`."""
        if self.pending + sequences > self.queue_size + self.slots.free:
            raise QueueFullError(self.retry_after_s())
        entry = QueueEntry(sequences)
        self.pending += sequences
        token = _current_entry.set(entry)
        try:
            yield entry
        finally:
            self.pending -= entry.pending
            entry.pending = 0
            _current_entry.reset(token)

    @contextlib.asynccontextmanager
    async def slot(self, *, sequences: int, prompt_tokens: int, max_tokens: int) -> AsyncIterator[Slot]:
        """Wait for a slot and hold it until the block ends. Raises :class:`AdmissionClosedError`."""
        slot = Slot(sequences, prompt_tokens, max_tokens, _current_entry.get())
        await self._wait(slot)
        try:
            yield slot
        finally:
            self._release(slot)

    def produced(self, slot: Slot, tokens: int, now: float) -> None:
        """Count new output tokens of all sequences of a slot, which came at ``now`` (seconds of the clock)."""
        if self.target is not None:
            self.target.observe(slot, tokens, now)
        slot.produced(tokens, now)

    def close(self) -> None:
        """Give out no more slots; waiting sequences get :class:`AdmissionClosedError`."""
        self.is_closed = True
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(AdmissionClosedError("the server is stopping"))
        self._waiting.clear()

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return self.slots.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return sum(slot.sequences for slot, _ in self._waiting)

    def capacity_tokens_per_s(self) -> float | None:
        """Output tokens per second while every slot is in use; ``None`` without measured step times."""
        return None if self.times is None else self.times.tokens_per_s(self.max_sequences)

    def retry_after_s(self) -> int:
        """Seconds until all that wait now have a slot, by the modelled rate at which slots become free."""
        slots_per_s = (self.capacity_tokens_per_s() or GUESSED_TOKENS_PER_S) / max(1.0, self.means.tokens)
        return min(3600, max(1, math.ceil((self.pending + 1) / slots_per_s)))

    async def _wait(self, slot: Slot) -> None:
        if self.is_closed:
            raise AdmissionClosedError("the server is stopping")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = (slot, future)
        self._waiting.append(waiting)
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if slot in self.slots:  # granted and cancelled in the same iteration of the event loop
                self._release(slot)
            elif waiting in self._waiting:
                self._waiting.remove(waiting)
                self._grant()
            raise

    def _grant(self) -> None:
        """Give slots to the head of the queue. If it waits for prefill time only, try again when there is enough."""
        if self.target is not None:
            self.target.refill()
        while self._waiting:
            slot, future = self._waiting[0]
            if not future.done():
                if not self._fits(slot):
                    break
                self._take(slot)
                future.set_result(None)
            self._waiting.popleft()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and self.target is not None:
            delay = self.target.seconds_until(self._waiting[0][0])
            if delay is not None:
                self._timer = asyncio.get_running_loop().call_later(delay, self._grant)

    def _fits(self, slot: Slot) -> bool:
        if self.slots.is_empty:
            return True  # alone anything may run: what exceeds the slots or the context was refused before
        if slot.sequences > self.slots.free:
            return False
        return self.target is None or self.target.fits(slot)

    def _take(self, slot: Slot) -> None:
        if self.target is not None:
            self.target.start(slot)
        self.slots.add(slot)
        if slot.entry is not None:
            started = min(slot.entry.pending, slot.sequences)
            slot.entry.pending -= started
            self.pending -= started

    def _release(self, slot: Slot) -> None:
        if self.target is not None:
            self.target.refill()
        self.slots.remove(slot)
        self.means.add(slot)
        if self.target is not None and self.slots.is_empty:
            self.target.bucket.fill()
        self._grant()
