"""Who may run now: seats for sequences, a bounded queue, and a promise of time per output token.

A request enters (:meth:`Admission.enter`) before its body is handled and is refused there with 429 if the queue
is full. Each of its sequences then takes a seat (:meth:`Admission.seat`) when the engine is about to run it, first
come first served, and gives it back at its end. Without ``slo_ms`` the seats are all there is.

With it three more things are kept:

- *Stall.* While n sequences decode in D(n) ms a step, each may be promised ``slo_ms`` per token as long as others'
  prefill takes at most the share 1 - D(n)/slo_ms of the time: T ms hold (T - stall)/D(n) steps, and
  T / steps <= slo_ms is the same as stall <= T (1 - D(n)/slo_ms). So stall is a budget that time earns and a
  prompt's prefill spends; a prompt waits until its own is earned, or, if it is a long one, leaves a debt.
- *KV cache.* A sequence is seated only if its prompt and its token limit fit beside all others', so that none is
  preempted and computed again. Its mean context adds to D(n).
- *Slowdown.* Where tokens take longer than measured (the clients run on the same cores, another process came), all
  measured times are multiplied by the median of real over modelled step time, learned from every token.

Nothing here knows vLLM. All calls are made on one event loop.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from tomoe_serving.admission.step_time import StepTimes

STALL_CAP = 4.0
"""Most stall that time earns, in steps of ``slo_ms``: how much prefill may come in one burst."""

FIRST_SLOWDOWN, SLOWDOWN_STEP = 1.5, 0.01
"""Slowdown before any token has come (real clients cost more than measured ones), and how far a token moves it."""

TARGET_SHARE = 0.8
"""Share of ``slo_ms`` that seating aims at: requests differ, and what is promised must hold for nearly all of them."""

FIRST_GUESS_TOKENS = 128
"""Output tokens of a request before any has finished."""


class QueueFullError(Exception):
    """No place left; ``retry_after_s`` is when the queue of now will have been seated."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class AdmissionClosedError(Exception):
    """The server stops: nobody is seated any more."""


@dataclass(eq=False)
class Place:
    """A request inside the house: how many of its sequences have no seat yet."""

    unseated: int


@dataclass(eq=False)
class Seat:
    """One running call of the engine: ``sequences`` that share a prompt."""

    sequences: int
    prompt_tokens: int
    max_tokens: int
    place: Place | None = None
    tokens: int = 0
    first_arrival: tuple[int, float] = (0, 0.0)
    last_arrival: float = 0.0

    @property
    def kv_tokens(self) -> int:
        """Cache that all its sequences can need."""
        return self.sequences * (self.prompt_tokens + self.max_tokens)

    @property
    def mean_context(self) -> float:
        return self.sequences * (self.prompt_tokens + self.max_tokens / 2)

    def produced(self, tokens: int, now: float) -> None:
        """Count new output tokens."""
        if not self.tokens:
            self.first_arrival = (tokens, now)
        self.tokens += tokens
        self.last_arrival = now

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first arrival; ``None`` where all came at once."""
        first_tokens, first = self.first_arrival
        later = (self.tokens - first_tokens) / self.sequences
        return 1000 * (self.last_arrival - first) / later if later > 0 else None


@dataclass(eq=False)
class Admission:
    """Seats, queue and promise; see the module.

    Attributes:
        max_sequences: seats.
        queue_size: sequences that may be inside without a seat, beyond the free seats.
        times: measured step times; ``None`` makes Retry-After a guess and allows no ``slo_ms``.
        slo_ms: time per output token to keep.
        kv_capacity: tokens that the KV cache holds.
        slowdown: real over measured time of a step without prefill, at least 1.
        context: mean context of all seats, in tokens.
    """

    max_sequences: int
    queue_size: int
    times: StepTimes | None = None
    slo_ms: float | None = None
    kv_capacity: int = 1 << 62
    clock: Callable[[], float] = time.monotonic
    running: int = 0
    unseated: int = 0
    refused: int = 0
    is_closed: bool = False
    seats: set[Seat] = field(default_factory=set)
    mean_output_tokens: float = FIRST_GUESS_TOKENS
    observed_tpot_ms: float | None = None
    slowdown: float = FIRST_SLOWDOWN
    context: float = 0.0
    _waiting: deque[tuple[Seat, asyncio.Future[None]]] = field(default_factory=deque)
    _stall_ms: float = 0.0
    _stall_at: float = 0.0
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        if self.slo_ms is not None and self.times is None:
            raise ValueError("an SLO needs measured step times")
        self._stall_ms, self._stall_at = self._stall_cap_ms, self.clock()

    @contextlib.contextmanager
    def enter(self, sequences: int = 1) -> Iterator[Place]:
        """A place for a request of so many sequences, until the block ends. Raises :class:`QueueFullError`."""
        free = max(0, self.max_sequences - self.running)
        if self.unseated + sequences > self.queue_size + free:
            self.refused += 1
            raise QueueFullError(self.retry_after_s())
        place = Place(sequences)
        self.unseated += sequences
        token = current_place.set(place)
        try:
            yield place
        finally:
            self.unseated -= place.unseated
            place.unseated = 0
            current_place.reset(token)

    @contextlib.asynccontextmanager
    async def seat(self, *, sequences: int, prompt_tokens: int, max_tokens: int) -> AsyncIterator[Seat]:
        """Wait for a seat and hold it until the block ends. Raises :class:`AdmissionClosedError`."""
        seat = Seat(sequences, prompt_tokens, max_tokens, current_place.get())
        await self._wait(seat)
        try:
            yield seat
        finally:
            self._leave(seat)

    def produced(self, seat: Seat, tokens: int, now: float) -> None:
        """Count a seat's new output tokens, of all its sequences, that came at ``now`` (the clock's seconds)."""
        if self.slo_ms is not None and seat.tokens and tokens > 0:
            step_ms = 1000 * (now - seat.last_arrival) * seat.sequences / tokens
            is_slower = step_ms > self._decode_ms()
            self.slowdown = max(1.0, self.slowdown * (1 + SLOWDOWN_STEP if is_slower else 1 - SLOWDOWN_STEP))
        seat.produced(tokens, now)

    def close(self) -> None:
        """Seat nobody any more; who waits is told so."""
        self.is_closed = True
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(AdmissionClosedError("the server is stopping"))
        self._waiting.clear()

    @property
    def waiting(self) -> int:
        """Sequences that wait for a seat."""
        return sum(seat.sequences for seat, _ in self._waiting)

    @property
    def kv_reserved(self) -> int:
        return sum(seat.kv_tokens for seat in self.seats)

    def capacity_tokens_per_s(self) -> float | None:
        """Output tokens per second with every seat taken."""
        return None if self.times is None else self.times.tokens_per_s(self.max_sequences)

    def retry_after_s(self) -> int:
        """Seconds until all that wait now are seated, from the modelled rate at which seats become free."""
        capacity = self.capacity_tokens_per_s() or 100.0
        seats_per_s = capacity / max(1.0, self.mean_output_tokens)
        return min(3600, max(1, math.ceil((self.unseated + 1) / seats_per_s)))

    async def _wait(self, seat: Seat) -> None:
        if self.is_closed:
            raise AdmissionClosedError("the server is stopping")
        if not self._waiting and self._fits(seat):
            return self._take(seat)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (seat, future)
        self._waiting.append(entry)
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if seat in self.seats:  # seated and cancelled in the same turn of the loop
                self._leave(seat)
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._grant()
            raise

    def _take(self, seat: Seat) -> None:
        self._earn()
        if self.slo_ms is not None and self.seats:
            self._stall_ms -= self._prefill_ms(seat)
        self.seats.add(seat)
        self.running += seat.sequences
        self.context += seat.mean_context
        if seat.place is not None:
            seated = min(seat.place.unseated, seat.sequences)
            seat.place.unseated -= seated
            self.unseated -= seated

    def _leave(self, seat: Seat) -> None:
        self._earn()
        self.seats.discard(seat)
        self.running -= seat.sequences
        self.context -= seat.mean_context
        if seat.tokens:
            self.mean_output_tokens += 0.1 * (seat.tokens / seat.sequences - self.mean_output_tokens)
        if (tpot := seat.tpot_ms) is not None:
            known = self.observed_tpot_ms
            self.observed_tpot_ms = tpot if known is None else known + 0.1 * (tpot - known)
        if not self.seats:
            self._stall_ms = self._stall_cap_ms
        self._grant()

    def _grant(self) -> None:
        """Seat those at the head of the queue that fit; look again when the first one's stall is earned."""
        while self._waiting:
            seat, future = self._waiting[0]
            if future.done():
                self._waiting.popleft()
            elif self._fits(seat):
                self._waiting.popleft()
                self._take(seat)
                future.set_result(None)
            else:
                break
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and (delay := self._earned_in(self._waiting[0][0])) is not None:
            self._timer = asyncio.get_running_loop().call_later(delay, self._grant)

    def _fits(self, seat: Seat) -> bool:
        if not self.seats:
            return True  # alone it may always run: larger than the seats is refused elsewhere
        if self.running + seat.sequences > self.max_sequences:
            return False
        if self.slo_ms is None:
            return True
        if self.kv_reserved + seat.kv_tokens > self.kv_capacity:
            return False
        self._earn()
        return self._decode_ms(seat) <= self._target_ms and self._stall_ms >= self._needed_ms(seat)

    def _decode_ms(self, newcomer: Seat | None = None) -> float:
        assert self.times is not None
        sequences, context = (newcomer.sequences, newcomer.mean_context) if newcomer else (0, 0.0)
        return self.slowdown * self.times.decode_ms(self.running + sequences, self.context + context)

    def _prefill_ms(self, seat: Seat) -> float:
        assert self.times is not None
        return self.slowdown * self.times.prefill_ms(seat.prompt_tokens)

    @property
    def _target_ms(self) -> float:
        return TARGET_SHARE * (self.slo_ms or 0.0)

    @property
    def _stall_cap_ms(self) -> float:
        return STALL_CAP * self._target_ms

    def _needed_ms(self, seat: Seat) -> float:
        return min(self._prefill_ms(seat), self._stall_cap_ms)

    def _rate(self) -> float:
        """Stall earned per millisecond now."""
        return max(0.0, 1 - self._decode_ms() / self._target_ms) if self.seats else 1.0

    def _earn(self) -> None:
        now = self.clock()
        if self.slo_ms is not None:
            earned = 1000 * (now - self._stall_at) * self._rate()
            self._stall_ms = min(self._stall_cap_ms, self._stall_ms + earned)
        self._stall_at = now

    def _earned_in(self, seat: Seat) -> float | None:
        """Seconds until the stall a seat needs is earned; ``None`` if that is not what it waits for."""
        if self.slo_ms is None or (rate := self._rate()) <= 0:
            return None
        self._earn()
        missing = self._needed_ms(seat) - self._stall_ms
        return max(0.001, missing / rate / 1000) if missing > 0 else None


current_place: ContextVar[Place | None] = ContextVar("current_place", default=None)
"""The place of the request that the current task works for."""
