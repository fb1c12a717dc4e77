"""Slots, queue and SLO, without an engine; the simulation at the end has its own clock."""

import asyncio
import random
import statistics

import pytest
from tomoe_serving.admission.controller import AdmissionClosedError, AdmissionController, QueueFullError
from tomoe_serving.admission.step_time import StepTimes

TIMES = StepTimes(decode=((1, 10.0), (16, 40.0)), prefill=((1, 10.0), (100, 60.0)))


def _slot(admission, prompt_tokens=10, max_tokens=10, sequences=1):
    return admission.slot(sequences=sequences, prompt_tokens=prompt_tokens, max_tokens=max_tokens)


def test_slots_are_taken_in_order_of_arrival():
    async def scenario():
        admission = AdmissionController(max_sequences=1, queue_size=9)
        order = []

        async def request(name):
            async with _slot(admission):
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(request(name) for name in "abcd"))
        return order, admission

    order, admission = asyncio.run(scenario())
    assert order == list("abcd")
    assert admission.running == admission.waiting == 0


def test_full_queue_refuses_with_retry_after():
    admission = AdmissionController(max_sequences=2, queue_size=3, times=TIMES)
    with admission.enqueue(2), admission.enqueue(3):
        with pytest.raises(QueueFullError) as caught, admission.enqueue(1):
            pass
        assert caught.value.retry_after_s >= 1
        assert admission.pending == 5
    assert admission.pending == 0


def test_retry_after_is_the_queue_over_the_modelled_rate():
    admission = AdmissionController(max_sequences=16, queue_size=1000, times=TIMES)
    admission.means.tokens = 100
    rate = 16 / 0.040 / 100  # requests per second
    with admission.enqueue(39):
        assert admission.retry_after_s() == -(-40 // rate)


def test_slot_takes_its_request_out_of_the_queue():
    async def scenario():
        admission = AdmissionController(max_sequences=4, queue_size=0)
        with admission.enqueue(2):
            async with _slot(admission):
                assert (admission.running, admission.pending) == (1, 1)
            assert admission.pending == 1
        assert admission.pending == 0
        async with _slot(admission):
            assert admission.pending == 0

    asyncio.run(scenario())


def test_cancelled_request_leaves_the_queue():
    async def scenario():
        admission = AdmissionController(max_sequences=1, queue_size=9)

        async def request():
            async with _slot(admission):
                await asyncio.sleep(0)

        async with _slot(admission):
            gone, stays = asyncio.create_task(request()), asyncio.create_task(request())
            await asyncio.sleep(0)
            assert admission.waiting == 2
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert admission.waiting == 1
        await stays
        return admission

    admission = asyncio.run(scenario())
    assert admission.running == 0


def test_request_cancelled_when_its_slot_is_granted_gives_it_back():
    async def scenario():
        admission = AdmissionController(max_sequences=1, queue_size=9)

        async def request():
            async with _slot(admission):
                await asyncio.sleep(3600)

        first = asyncio.create_task(request())
        await asyncio.sleep(0)
        second = asyncio.create_task(request())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        return admission

    admission = asyncio.run(scenario())
    assert admission.running == admission.waiting == 0


def test_closing_ends_waiting_requests():
    async def scenario():
        admission = AdmissionController(max_sequences=1, queue_size=9)
        async with _slot(admission):
            waiting = asyncio.create_task(_slot(admission).__aenter__())
            await asyncio.sleep(0)
            admission.close()
            with pytest.raises(AdmissionClosedError):
                await waiting
        with pytest.raises(AdmissionClosedError):
            await _slot(admission).__aenter__()

    asyncio.run(scenario())


def test_with_an_slo_the_kv_cache_is_never_overcommitted():
    async def scenario():
        admission = AdmissionController(max_sequences=16, queue_size=9, times=TIMES, slo_ms=40, kv_capacity=100)
        second = _slot(admission, 30, 30)
        async with _slot(admission, 30, 30):
            waiting = asyncio.create_task(second.__aenter__())
            await asyncio.sleep(0)
            assert admission.slots.kv_reserved == 60
            assert not waiting.done()
        await waiting
        assert admission.slots.kv_reserved == 60
        await second.__aexit__(None, None, None)
        assert admission.slots.kv_reserved == 0

    asyncio.run(scenario())


def test_no_timer_runs_while_a_request_waits_for_a_slot():
    async def scenario():
        admission = AdmissionController(max_sequences=1, queue_size=9, times=TIMES, slo_ms=40)
        second = _slot(admission)
        async with _slot(admission):
            waiting = asyncio.create_task(second.__aenter__())
            await asyncio.sleep(0)
            assert admission._timer is None
        await waiting
        await second.__aexit__(None, None, None)

    asyncio.run(scenario())


def test_a_timer_grants_the_slot_when_the_bucket_has_refilled():
    async def scenario():
        admission = AdmissionController(max_sequences=4, queue_size=9, times=TIMES, slo_ms=40)
        third = _slot(admission, prompt_tokens=20)
        async with _slot(admission), _slot(admission, prompt_tokens=400):  # the long one overdraws the bucket
            waiting = asyncio.create_task(third.__aenter__())
            await asyncio.sleep(0)
            assert not waiting.done()
            await asyncio.wait_for(waiting, 60)
            assert admission.running == 3
            await third.__aexit__(None, None, None)

    asyncio.run(scenario())


def test_bucket_refills_at_the_rate_before_a_release():
    async def scenario():
        now = [0.0]
        admission = AdmissionController(4, 9, TIMES, slo_ms=40, clock=lambda: now[0])
        bucket = admission.target.bucket
        async with _slot(admission):
            async with _slot(admission, sequences=2):
                bucket.level_ms = 0.0
                now[0] += 0.01
            decode_ms = admission.target.slowdown.factor * TIMES.decode_ms(3)
            assert bucket.level_ms == pytest.approx(10 * (1 - decode_ms / admission.target.target_ms))

    asyncio.run(scenario())


def test_bucket_is_full_when_no_slot_is_in_use():
    async def scenario():
        admission = AdmissionController(max_sequences=4, queue_size=9, times=TIMES, slo_ms=40, clock=lambda: 0.0)
        async with _slot(admission), _slot(admission, prompt_tokens=400):
            assert admission.target.bucket.level_ms < 0
        assert admission.target.bucket.level_ms == admission.target.bucket.capacity_ms

    asyncio.run(scenario())


def test_slow_steps_raise_the_slowdown():
    async def scenario():
        admission = AdmissionController(max_sequences=4, queue_size=9, times=TIMES, slo_ms=40)
        before = admission.target.slowdown.factor
        async with _slot(admission) as slot:
            admission.produced(slot, 1, 1.0)
            admission.produced(slot, 1, 9.0)
        return before, admission.target.slowdown.factor

    before, after = asyncio.run(scenario())
    assert after > before


def test_an_slo_needs_a_measurement():
    with pytest.raises(ValueError, match="measured"):
        AdmissionController(max_sequences=1, queue_size=1, slo_ms=5)


def test_mean_tpot_ignores_the_first_arrival():
    async def scenario():
        admission = AdmissionController(max_sequences=4, queue_size=0)
        async with _slot(admission) as slot:
            for tokens, now in ((2, 1.0), (1, 1.1), (3, 1.4)):
                slot.produced(tokens, now)
        async with _slot(admission) as slot:
            slot.produced(50, 9.0)  # all at once: no time per token
        return admission

    assert asyncio.run(scenario()).means.tpot_ms == pytest.approx(100)


class Machine:
    """An engine that follows the step-time model, in simulated time: a step takes decode(n) plus its prompts' prefill.

    Clients send the next request as soon as one ends, so the load never ends.
    """

    def __init__(self, slo_ms, *, clients, prompt_tokens, max_tokens, noise=0.0, slowness=1.0):
        self.now = 0.0
        self.admission = AdmissionController(
            max_sequences=16, queue_size=10_000, times=TIMES, slo_ms=slo_ms, clock=lambda: self.now
        )
        self.random = random.Random(0)
        self.prompt_tokens, self.max_tokens, self.noise = prompt_tokens, max_tokens, noise
        self.slowness = slowness
        self.clients, self.tpots, self.prefills, self.running = clients, [], [], {}

    async def client(self):
        while True:
            prompt, tokens = self.random.choice(self.prompt_tokens), self.random.choice(self.max_tokens)
            async with _slot(self.admission, prompt, tokens) as slot:
                done = asyncio.get_running_loop().create_future()
                self.prefills.append((slot, prompt, tokens, done))
                self.tpots.append(await done)

    async def run(self, requests):
        tasks = [asyncio.create_task(self.client()) for _ in range(self.clients)]
        while len(self.tpots) < requests:
            await asyncio.sleep(0)
            self.admission._grant()  # as the timer does in real time
            await asyncio.sleep(0)
            self.step()
        for task in tasks:
            task.cancel()
        return sorted(self.tpots)

    def step(self):
        ms = TIMES.decode_ms(len(self.running)) if self.running else 1.0
        ms *= 1 + self.noise * self.random.random()
        started = []
        if self.prefills:
            slot, prompt, tokens, done = self.prefills.pop(0)
            ms += TIMES.prefill_ms(prompt)
            started = [(slot, tokens, done)]
        self.now += self.slowness * ms / 1000
        for slot, (start, left, total, done) in list(self.running.items()):
            self.admission.produced(slot, 1, self.now)
            if left == 1:
                del self.running[slot]
                done.set_result(1000 * (self.now - start) / (total - 1))
            else:
                self.running[slot] = (start, left - 1, total, done)
        for slot, tokens, done in started:
            self.admission.produced(slot, 1, self.now)
            self.running[slot] = (self.now, tokens - 1, tokens, done)


def _p95(values):
    return values[int(0.95 * len(values))]


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens"),
    [
        ([10], [64]),  # little prefill
        ([100], [64]),  # a prompt costs as much as several steps
        ([5, 50, 200], [40, 100, 200]),  # mixed
    ],
)
def test_time_per_token_stays_within_the_slo_under_endless_load(prompt_tokens, max_tokens):
    slo = TIMES.decode_ms(8)
    machine = Machine(slo, clients=64, prompt_tokens=prompt_tokens, max_tokens=max_tokens)
    tpots = asyncio.run(machine.run(400))
    assert _p95(tpots) <= 1.15 * slo
    assert statistics.median(tpots) >= 0.5 * slo, "the slots were not used"


@pytest.mark.parametrize("slowness", [1.2, 1.5])
@pytest.mark.parametrize("prompt_tokens", [[10], [100]])
def test_slo_holds_on_a_machine_slower_than_measured(slowness, prompt_tokens):
    slo = slowness * TIMES.decode_ms(8)
    fields = {"clients": 64, "prompt_tokens": prompt_tokens, "max_tokens": [64], "slowness": slowness}
    tpots = asyncio.run(Machine(slo, **fields).run(600))
    assert _p95(tpots) <= 1.15 * slo
    assert statistics.median(tpots) >= 0.5 * slo, "the slots were not used"


def test_the_simulation_breaks_the_slo_without_a_target():
    slo = TIMES.decode_ms(8)
    machine = Machine(None, clients=64, prompt_tokens=[100], max_tokens=[64])
    assert _p95(asyncio.run(machine.run(400))) > 1.15 * slo


def test_a_single_client_never_waits():
    machine = Machine(TIMES.decode_ms(2), clients=1, prompt_tokens=[400], max_tokens=[20])
    asyncio.run(machine.run(5))
    assert machine.now < 5 * (0.3 + 20 * 0.012)
    assert machine.admission.waiting == 0
