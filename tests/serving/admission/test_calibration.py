"""Measurement of an engine whose step times are known, on a simulated clock."""

import asyncio

import pytest
from tomoe_serving.admission import calibration
from tomoe_serving.admission.calibration import measure_step_times


class FakeClock:
    """Step time 2 + 0.5 n ms for n sequences, 3 + 0.1 t ms for a prompt of t tokens, 0.01 ms per token of context."""

    def __init__(self, monkeypatch):
        self.now, self.waiting, self.stepping = 0.0, [], None
        self.prompts = []
        monkeypatch.setattr(calibration.time, "perf_counter", lambda: self.now)

    async def stream(self, prompt, new_tokens):
        self.prompts.append(tuple(prompt))
        for index in range(new_tokens):
            token = asyncio.get_running_loop().create_future()
            cost = 3 + 0.1 * len(prompt) if index == 0 else 0.01 * len(prompt)
            self.waiting.append((token, cost, index))
            if self.stepping is None:
                self.stepping = asyncio.get_running_loop().create_task(self.step())
            await token
            yield 1

    async def step(self):
        for _ in range(5):
            await asyncio.sleep(0)
        batch, self.waiting, self.stepping = self.waiting, [], None
        decodes = sum(index > 0 for _, _, index in batch)
        self.now += (sum(cost for _, cost, _ in batch) + (2 + 0.5 * decodes if decodes else 0)) / 1000
        for token, _, _ in batch:
            token.set_result(None)


def _measure(monkeypatch, **options):
    clock = FakeClock(monkeypatch)
    limits = {"vocab_size": 90, "max_sequences": 6, "max_step_tokens": 100, "max_model_len": 512}
    return asyncio.run(measure_step_times(clock.stream, **(limits | options))), clock


def test_known_step_times_are_measured(monkeypatch):
    times, _ = _measure(monkeypatch)
    assert [size for size, _ in times.decode] == [1, 2, 4, 6]
    for size, ms in times.decode:
        assert ms == pytest.approx(2 + 0.5 * size + 0.01 * 8 * size)
    assert [size for size, _ in times.prefill] == [1, 16, 32, 64, 100]
    for size, ms in times.prefill:
        assert ms == pytest.approx(3 + 0.1 * size)
    assert times.kv_ms_per_token == pytest.approx(0.01)


def test_measurement_stops_at_a_step_that_is_too_slow(monkeypatch):
    times, _ = _measure(monkeypatch, enough_ms=1.6)
    assert [size for size, _ in times.decode] == [1, 2, 4]
    assert [size for size, _ in times.prefill][-1] < 100


def test_all_long_prompts_differ(monkeypatch):
    _, clock = _measure(monkeypatch)
    long = [prompt for prompt in clock.prompts if len(prompt) > 4]
    assert len(set(long)) == len(long)


def test_short_context_is_measured(monkeypatch):
    times, clock = _measure(monkeypatch, max_model_len=16, max_step_tokens=16)
    assert times.kv_ms_per_token == 0
    assert max(map(len, clock.prompts)) < 16
