"""Step time as a function of the tokens in a step: what a fixed budget per token makes predictable.

Every token costs the same active parameters whatever the input, so a step's time depends on how many tokens it
holds (and, for attention, on how much context they look at), not on what they say. Two curves are measured,
because a decoding sequence pays more per token than a prefill chunk does (its own logits and sampling):

    step_ms(n, c, kv) = decode(n) + prefill(n + c) - prefill(n) + kv_ms_per_token * kv

with n decoding sequences, c prompt tokens beside them, and kv tokens of context beyond the measured one.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Points = tuple[tuple[int, float], ...]
"""(size, milliseconds), sizes ascending."""


def interpolate(points: Points, size: float) -> float:
    """Piecewise linear; below the first point its value, beyond the last one the last slope (never falling)."""
    if len(points) == 1 or size <= points[0][0]:
        return points[0][1] * (1.0 if len(points) > 1 else max(1.0, size / points[0][0]))
    right = min(max(bisect_left([x for x, _ in points], size), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + max(0.0, (y1 - y0) / (x1 - x0)) * (size - x0)


def rising(points: Sequence[tuple[int, float]]) -> Points:
    """Measured points with noise removed that would make more work look faster."""
    highest, result = 0.0, []
    for size, ms in sorted(points):
        highest = max(highest, ms)
        result.append((size, highest))
    return tuple(result)


@dataclass(frozen=True)
class StepTimes:
    """Measured milliseconds of a step.

    Attributes:
        decode: (sequences, ms): each gets one token.
        prefill: (prompt tokens, ms): one sequence's first token after a prompt of that length.
        kv_ms_per_token: what one more token of context adds to a step.
    """

    decode: Points
    prefill: Points
    kv_ms_per_token: float = 0.0

    def decode_ms(self, sequences: int, context_tokens: float = 0.0) -> float:
        """A step of ``sequences`` tokens that look at ``context_tokens`` in all."""
        return interpolate(self.decode, sequences) + self.kv_ms_per_token * context_tokens

    def prefill_ms(self, tokens: int) -> float:
        """What ``tokens`` of a prompt add to the running sequences' steps."""
        return max(0.0, interpolate(self.prefill, tokens) - interpolate(self.prefill, 1))

    def largest(self, points: Points, limit_ms: float, most: int) -> int:
        """Largest size up to ``most`` whose time is within ``limit_ms``; 0 if none is."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if interpolate(points, middle) <= limit_ms else (low, middle - 1)
        return low

    def tokens_per_s(self, sequences: int) -> float:
        """Output tokens per second with ``sequences`` decoding."""
        return 1000.0 * sequences / self.decode_ms(sequences)


@dataclass(frozen=True)
class Limits:
    """What may run at once: sequences, and tokens in one step (decode and prompt together)."""

    max_sequences: int
    max_step_tokens: int


def limits_for(times: StepTimes, slo_ms: float, *, max_sequences: int, max_step_tokens: int) -> Limits:
    """The largest limits that keep decoding within ``slo_ms``.

    Sequences: decode alone stays within it. Tokens per step: one prefill chunk takes at most ``slo_ms``, so no
    single step takes more than twice that; how often such steps come is the admission's business.

    Raises ``ValueError`` if even one sequence alone is too slow.
    """
    sequences = times.largest(times.decode, slo_ms, max_sequences)
    if not sequences:
        alone = times.decode_ms(1)
        raise ValueError(f"--tpot-slo-ms {slo_ms:g} cannot be kept: one stream alone needs {alone:.1f} ms per token")
    chunk = times.largest(times.prefill, slo_ms, max_step_tokens)
    return Limits(sequences, min(max_step_tokens, max(chunk, 2 * sequences, 16)))


@dataclass(frozen=True)
class Profile:
    """Step times with what they were measured for: they hold for no other ``key``."""

    key: dict[str, object]
    times: StepTimes

    def write(self, file: Path) -> None:
        """Write it whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.tmp")
        temporary.write_text(json.dumps({"key": self.key} | asdict(self.times), indent=1) + "\n")
        temporary.replace(file)

    @classmethod
    def read(cls, file: Path) -> "Profile":
        """Raises ``ValueError`` if the file is not a profile."""
        try:
            data = json.loads(file.read_text())
            decode, prefill = (tuple((int(n), float(ms)) for n, ms in data[name]) for name in ("decode", "prefill"))
            if not decode or not prefill:
                raise ValueError
            return cls(dict(data["key"]), StepTimes(decode, prefill, float(data["kv_ms_per_token"])))
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file} is not a step-time profile: remove it, and the next start measures anew"
            ) from error

    def require(self, key: dict[str, object], file: Path) -> None:
        """Raise ``ValueError`` naming the first difference if the profile is for something else."""
        for name, value in key.items():
            if self.key.get(name) != value:
                raise ValueError(
                    f"{file} was measured with {name} {self.key.get(name)!r}, this is {value!r}: "
                    "remove it or name another --profile"
                )
