"""Measures the step times of the engine at start-up, before the port opens.

Requests go through the same engine client as those of users, so the times include the communication with the engine's
process. Prompts are random, so that none is in the prefix cache.
"""

import asyncio
import itertools
import logging
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable

from tomoe_serving.admission.step_time import StepTimes, interpolate, rising

logger = logging.getLogger(__name__)

Stream = Callable[[list[int], int], AsyncIterator[int]]
"""``stream(prompt_ids, new_tokens)`` yields the number of new tokens each time some arrive."""

SHORT_PROMPT = 8
STEPS = 12
"""Decode steps of one measurement. Its median ignores one or two that another process disturbed."""

MAX_SECONDS = 60.0
"""After this time no larger size is measured; the curve is extrapolated beyond the last one."""


async def _arrivals(stream: Stream, prompt: list[int], new_tokens: int) -> list[float]:
    times = []
    async for count in stream(prompt, new_tokens):
        times += [time.perf_counter()] * count
    return times


async def step_ms(stream: Stream, prompts: list[list[int]], new_tokens: int = STEPS) -> float:
    """Median time between tokens of the sequence that starts last, while all others decode as well."""
    arrivals = await asyncio.gather(*(_arrivals(stream, prompt, new_tokens) for prompt in prompts))
    last = max(arrivals, key=lambda times: times[0])
    gaps = [b - a for a, b in itertools.pairwise(last) if b > a]
    return 1000 * statistics.median(gaps) if gaps else 0.0


async def first_token_ms(stream: Stream, prompt: list[int]) -> float:
    """Time from a prompt to its first token, with no other sequence running."""
    start = time.perf_counter()
    return 1000 * ((await _arrivals(stream, prompt, 1))[0] - start)


async def measure_step_times(
    stream: Stream,
    *,
    vocab_size: int,
    max_sequences: int,
    max_step_tokens: int,
    max_model_len: int,
    enough_ms: float | None = None,
) -> StepTimes:
    """Measure step times up to the engine's limits.

    Args:
        stream: generates with the engine.
        vocab_size: random prompts are drawn from ``range(vocab_size)``.
        max_sequences: largest decode batch.
        max_step_tokens: longest prompt that is prefilled in one step.
        max_model_len: context of the model, in tokens.
        enough_ms: larger sizes are not measured once a step takes twice as long.
    """
    randomness = random.Random(0)
    deadline = time.monotonic() + MAX_SECONDS

    def prompt(length: int) -> list[int]:
        return [randomness.randrange(vocab_size) for _ in range(length)]

    short = min(SHORT_PROMPT, max_model_len // 4)
    steps = min(STEPS, max_model_len - short - 1)
    decode: list[tuple[int, float]] = []
    for size in _doubling(1, max_sequences):
        await step_ms(stream, [prompt(short) for _ in range(size)], 3)  # warm-up at this size
        decode.append((size, await step_ms(stream, [prompt(short) for _ in range(size)], steps)))
        logger.info("%d sequences: %.1f ms per step", *decode[-1])
        if time.monotonic() > deadline or (enough_ms and decode[-1][1] > 2 * enough_ms):
            break
    prefill: list[tuple[int, float]] = []
    longest = min(max_step_tokens, max_model_len - 1)
    for size in sorted({1, *_doubling(min(16, longest), longest)}):
        tries = [await first_token_ms(stream, prompt(size)) for _ in range(3)]
        prefill.append((size, min(tries)))
        logger.info("prompt of %d tokens: %.1f ms", *prefill[-1])
        if time.monotonic() > deadline + MAX_SECONDS or (enough_ms and prefill[-1][1] > 2 * enough_ms):
            break
    times = StepTimes(rising(decode), rising(prefill))
    return StepTimes(times.decode, times.prefill, await _kv_ms_per_token(stream, prompt, times, max_model_len, short))


async def _kv_ms_per_token(
    stream: Stream, prompt: Callable[[int], list[int]], times: StepTimes, max_model_len: int, short: int
) -> float:
    """Time that a token of context adds to a step: a single sequence with a long context against a short one."""
    long = min(max_model_len - STEPS - 1, 1024)
    if long < 4 * short:
        return 0.0
    slower = await step_ms(stream, [prompt(long)]) - interpolate(times.decode, 1)
    return max(0.0, slower / (long - short))


def _doubling(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] * 2 < last:
        sizes.append(sizes[-1] * 2)
    return sizes + [last] * (last > sizes[-1])
