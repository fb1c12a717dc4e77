"""Slots of the engine, and the KV cache that the sequences in them can need."""

from dataclasses import dataclass, field


@dataclass(eq=False)
class QueueEntry:
    """An accepted request. ``pending``: how many of its sequences do not hold a slot yet."""

    pending: int


@dataclass(eq=False)
class Slot:
    """One call of the engine: ``sequences`` that share a prompt.

    Attributes:
        prompt_tokens: length of the prompt.
        max_tokens: limit of output tokens of each sequence.
        entry: the request that it belongs to; ``None`` outside of a request.
        tokens: output tokens of all sequences so far.
    """

    sequences: int
    prompt_tokens: int
    max_tokens: int
    entry: QueueEntry | None = None
    tokens: int = 0
    first_arrival: tuple[int, float] = (0, 0.0)
    last_arrival: float = 0.0

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that all its sequences can need."""
        return self.sequences * (self.prompt_tokens + self.max_tokens)

    @property
    def mean_context(self) -> float:
        """Context of all its sequences, in tokens, averaged over their steps."""
        return self.sequences * (self.prompt_tokens + self.max_tokens / 2)

    def produced(self, tokens: int, now: float) -> None:
        """Count new output tokens that came at ``now``, in seconds."""
        if not self.tokens:
            self.first_arrival = (tokens, now)
        self.tokens += tokens
        self.last_arrival = now

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token after the first arrival; ``None`` if all tokens came at once."""
        first_tokens, first = self.first_arrival
        later = (self.tokens - first_tokens) / self.sequences
        return 1000 * (self.last_arrival - first) / later if later > 0 else None


@dataclass(eq=False)
class SlotPool:
    """The slots in use.

    Attributes:
        max_sequences: most sequences that run at once.
        kv_capacity: tokens that the KV cache holds.
        running: sequences that hold a slot.
        context: sum of the slots' ``mean_context``.
    """

    max_sequences: int
    kv_capacity: int
    slots: set[Slot] = field(default_factory=set)
    running: int = 0
    context: float = 0.0

    def __contains__(self, slot: Slot) -> bool:
        return slot in self.slots

    @property
    def is_empty(self) -> bool:
        return not self.slots

    @property
    def free(self) -> int:
        """Sequences that could start now."""
        return max(0, self.max_sequences - self.running)

    @property
    def kv_reserved(self) -> int:
        """Tokens of KV cache that the slots in use can need."""
        return sum(slot.kv_tokens for slot in self.slots)

    def fits_cache(self, slot: Slot) -> bool:
        """Whether the KV cache holds all that ``slot`` and the slots in use can need."""
        return self.kv_reserved + slot.kv_tokens <= self.kv_capacity

    def add(self, slot: Slot) -> None:
        self.slots.add(slot)
        self.running += slot.sequences
        self.context += slot.mean_context

    def remove(self, slot: Slot) -> None:
        self.slots.discard(slot)
        self.running -= slot.sequences
        self.context -= slot.mean_context


@dataclass(eq=False)
class OutputMeans:
    """Exponential means over the slots that were given back.

    Attributes:
        tokens: output tokens of a sequence; before the first one a guess.
        tpot_ms: time per output token; ``None`` before the first one.
    """

    tokens: float = 128.0
    tpot_ms: float | None = None

    def add(self, slot: Slot) -> None:
        if slot.tokens:
            self.tokens += 0.1 * (slot.tokens / slot.sequences - self.tokens)
        if (tpot := slot.tpot_ms) is not None:
            self.tpot_ms = tpot if self.tpot_ms is None else self.tpot_ms + 0.1 * (tpot - self.tpot_ms)
