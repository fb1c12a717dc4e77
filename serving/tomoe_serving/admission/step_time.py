"""Model of the step time as a function of the number of tokens in the step.

Every token uses the same number of active parameters, so the time of a step depends on how many tokens it holds and,
through attention, on their context, but not on which tokens they are. Two curves are measured, because a decoding
sequence costs more per token than a prefill chunk (its logits and sampling):

    step_ms(n, c, kv) = decode(n) + prefill(n + c) - prefill(n) + kv_ms_per_token * kv

with n decoding sequences, c prompt tokens in the same step, and kv tokens of context beyond that of the measurement.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Points = tuple[tuple[int, float], ...]
"""(size, milliseconds) by ascending size."""


def interpolate(points: Points, size: float) -> float:
    """Piecewise linear. Constant below the first point; beyond the last one the last slope, at least 0."""
    if len(points) == 1 or size <= points[0][0]:
        return points[0][1] * (1.0 if len(points) > 1 else max(1.0, size / points[0][0]))
    right = min(max(bisect_left([x for x, _ in points], size), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + max(0.0, (y1 - y0) / (x1 - x0)) * (size - x0)


def rising(points: Sequence[tuple[int, float]]) -> Points:
    """Running maximum of measured points, which removes noise that would make a larger size faster."""
    highest, result = 0.0, []
    for size, ms in sorted(points):
        highest = max(highest, ms)
        result.append((size, highest))
    return tuple(result)


@dataclass(frozen=True)
class StepTimes:
    """Measured milliseconds of a step.

    Attributes:
        decode: (sequences, ms) of steps in which each sequence gets one token.
        prefill: (prompt tokens, ms) from a prompt to its first token.
        kv_ms_per_token: time that one more token of context adds to a step.
    """

    decode: Points
    prefill: Points
    kv_ms_per_token: float = 0.0

    def decode_ms(self, sequences: int, context_tokens: float = 0.0) -> float:
        """Time of a decode step of ``sequences`` with ``context_tokens`` in total."""
        return interpolate(self.decode, sequences) + self.kv_ms_per_token * context_tokens

    def prefill_ms(self, tokens: int) -> float:
        """Time that a prompt of ``tokens`` adds to the steps of the running sequences."""
        return max(0.0, interpolate(self.prefill, tokens) - interpolate(self.prefill, 1))

    def largest(self, points: Points, limit_ms: float, most: int) -> int:
        """Largest size up to ``most`` whose time is at most ``limit_ms``; 0 if there is none."""
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
    """What can run at once: sequences, and tokens in one step (decode and prefill together)."""

    max_sequences: int
    max_step_tokens: int


def limits_for(times: StepTimes, slo_ms: float, *, max_sequences: int, max_step_tokens: int) -> Limits:
    """The largest limits with which a decode step, and a prefill chunk, each take at most ``slo_ms``.

    No step then takes more than twice ``slo_ms``. How often prefill slows a step down is limited by ``PrefillBucket``.

    Raises ``ValueError`` if one sequence alone takes longer.
    """
    sequences = times.largest(times.decode, slo_ms, max_sequences)
    if not sequences:
        alone = times.decode_ms(1)
        raise ValueError(f"--tpot-slo-ms {slo_ms:g} is not possible: a single stream takes {alone:.1f} ms per token")
    chunk = times.largest(times.prefill, slo_ms, max_step_tokens)
    return Limits(sequences, min(max_step_tokens, max(chunk, 2 * sequences, 16)))


@dataclass(frozen=True)
class Profile:
    """Step times and the ``key`` they were measured for."""

    key: dict[str, object]
    times: StepTimes

    def write(self, file: Path) -> None:
        """Write the file atomically."""
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
                f"{file} is not a step-time profile; remove it to measure again at the next start"
            ) from error

    def require(self, key: dict[str, object], file: Path) -> None:
        """Raise ``ValueError`` that names the first difference if the profile was measured for another key."""
        for name, value in key.items():
            if self.key.get(name) != value:
                raise ValueError(
                    f"{file} was measured with {name} {self.key.get(name)!r}, but it is {value!r} now: "
                    "remove the file or give another --profile"
                )
