"""Seats, queue and promise, on a clock of the test's own; no engine."""

import asyncio
import random
import statistics

import pytest
from tomoe_serving.admission.controller import Admission, AdmissionClosedError, QueueFullError, current_place
from tomoe_serving.admission.step_time import StepTimes

TIMES = StepTimes(decode=((1, 10.0), (16, 40.0)), prefill=((1, 10.0), (100, 60.0)))


def _seat(admission, prompt_tokens=10, max_tokens=10, sequences=1):
    return admission.seat(sequences=sequences, prompt_tokens=prompt_tokens, max_tokens=max_tokens)


def test_seats_are_taken_in_order_of_arrival():
    async def scenario():
        admission = Admission(max_sequences=1, queue_size=9)
        order = []

        async def request(name):
            async with _seat(admission):
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(request(name) for name in "abcd"))
        return order, admission

    order, admission = asyncio.run(scenario())
    assert order == list("abcd")
    assert admission.running == admission.waiting == 0


def test_queue_is_bounded_and_says_when_to_come_back():
    admission = Admission(max_sequences=2, queue_size=3, times=TIMES)
    with admission.enter(2), admission.enter(3):
        with pytest.raises(QueueFullError) as caught, admission.enter(1):
            pass
        assert caught.value.retry_after_s >= 1
        assert admission.unseated == 5
    assert admission.unseated == 0
    assert admission.refused == 1


def test_retry_after_is_the_queue_over_the_modelled_rate():
    admission = Admission(max_sequences=16, queue_size=1000, times=TIMES)
    admission.mean_output_tokens = 100
    rate = 16 / 0.040 / 100  # requests per second
    with admission.enter(39):
        assert admission.retry_after_s() == -(-40 // rate)


def test_a_seat_takes_its_request_out_of_the_queue():
    async def scenario():
        admission = Admission(max_sequences=4, queue_size=0)
        with admission.enter(2) as place:
            assert current_place.get() is place
            async with _seat(admission):
                assert (admission.running, admission.unseated) == (1, 1)
            assert admission.unseated == 1
        assert admission.unseated == 0
        assert current_place.get() is None

    asyncio.run(scenario())


def test_who_gives_up_leaves_the_queue_and_no_seat_is_lost():
    async def scenario():
        admission = Admission(max_sequences=1, queue_size=9)

        async def request():
            async with _seat(admission):
                await asyncio.sleep(0)

        async with _seat(admission):
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


def test_cancelled_in_the_turn_it_was_seated_gives_the_seat_back():
    async def scenario():
        admission = Admission(max_sequences=1, queue_size=9)

        async def request():
            async with _seat(admission):
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


def test_closing_sends_those_who_wait_away():
    async def scenario():
        admission = Admission(max_sequences=1, queue_size=9)
        async with _seat(admission):
            waiting = asyncio.create_task(_seat(admission).__aenter__())
            await asyncio.sleep(0)
            admission.close()
            with pytest.raises(AdmissionClosedError):
                await waiting
        with pytest.raises(AdmissionClosedError):
            await _seat(admission).__aenter__()

    asyncio.run(scenario())


def test_with_an_slo_the_cache_is_never_overcommitted():
    async def scenario():
        admission = Admission(max_sequences=16, queue_size=9, times=TIMES, slo_ms=40, kv_capacity=100)
        second = _seat(admission, 30, 30)
        async with _seat(admission, 30, 30):
            waiting = asyncio.create_task(second.__aenter__())
            await asyncio.sleep(0)
            assert admission.kv_reserved == 60
            assert not waiting.done()
        await waiting
        assert admission.kv_reserved == 60
        await second.__aexit__(None, None, None)
        assert admission.kv_reserved == 0

    asyncio.run(scenario())


def test_who_waits_for_a_seat_alone_is_not_asked_about_again_and_again():
    async def scenario():
        admission = Admission(max_sequences=1, queue_size=9, times=TIMES, slo_ms=40)
        second = _seat(admission)
        async with _seat(admission):
            waiting = asyncio.create_task(second.__aenter__())
            await asyncio.sleep(0)
            assert admission._timer is None
        await waiting
        await second.__aexit__(None, None, None)

    asyncio.run(scenario())


def test_a_timer_seats_who_waits_for_stall_to_be_earned():
    async def scenario():
        admission = Admission(max_sequences=4, queue_size=9, times=TIMES, slo_ms=40)
        third = _seat(admission, prompt_tokens=20)
        async with _seat(admission), _seat(admission, prompt_tokens=400):  # the long one leaves a debt
            waiting = asyncio.create_task(third.__aenter__())
            await asyncio.sleep(0)
            assert not waiting.done()
            await asyncio.wait_for(waiting, 60)
            assert admission.running == 3
            await third.__aexit__(None, None, None)

    asyncio.run(scenario())


def test_an_slo_needs_a_measurement():
    with pytest.raises(ValueError, match="measured"):
        Admission(max_sequences=1, queue_size=1, slo_ms=5)


def test_tpot_counts_what_came_after_the_first_arrival():
    async def scenario():
        admission = Admission(max_sequences=4, queue_size=0)
        async with _seat(admission) as seat:
            for tokens, now in ((2, 1.0), (1, 1.1), (3, 1.4)):
                seat.produced(tokens, now)
        async with _seat(admission) as seat:
            seat.produced(50, 9.0)  # all at once: says nothing about time per token
        return admission

    assert asyncio.run(scenario()).observed_tpot_ms == pytest.approx(100)


class Machine:
    """An engine as the model describes it: a step costs decode(n) plus its prompt chunks; on simulated time.

    Clients come back at once when they are done, so the load never ends.
    """

    def __init__(self, slo_ms, *, clients, prompt_tokens, max_tokens, noise=0.0, slowness=1.0):
        self.now = 0.0
        self.admission = Admission(
            max_sequences=16, queue_size=10_000, times=TIMES, slo_ms=slo_ms, clock=lambda: self.now
        )
        self.random = random.Random(0)
        self.prompt_tokens, self.max_tokens, self.noise = prompt_tokens, max_tokens, noise
        self.slowness = slowness
        self.clients, self.tpots, self.prefills, self.running = clients, [], [], {}

    async def client(self):
        while True:
            prompt, tokens = self.random.choice(self.prompt_tokens), self.random.choice(self.max_tokens)
            async with _seat(self.admission, prompt, tokens) as seat:
                done = asyncio.get_running_loop().create_future()
                self.prefills.append((seat, prompt, tokens, done))
                self.tpots.append(await done)

    async def run(self, requests):
        tasks = [asyncio.create_task(self.client()) for _ in range(self.clients)]
        while len(self.tpots) < requests:
            await asyncio.sleep(0)
            self.admission._grant()  # what the timer does in real time
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
            seat, prompt, tokens, done = self.prefills.pop(0)
            ms += TIMES.prefill_ms(prompt)
            started = [(seat, tokens, done)]
        self.now += self.slowness * ms / 1000
        for seat, (start, left, total, done) in list(self.running.items()):
            self.admission.produced(seat, 1, self.now)
            if left == 1:
                del self.running[seat]
                done.set_result(1000 * (self.now - start) / (total - 1))
            else:
                self.running[seat] = (start, left - 1, total, done)
        for seat, tokens, done in started:
            self.admission.produced(seat, 1, self.now)
            self.running[seat] = (self.now, tokens - 1, tokens, done)


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
    assert statistics.median(tpots) >= 0.5 * slo, "the seats were not used"


@pytest.mark.parametrize("slowness", [1.2, 1.5])
@pytest.mark.parametrize("prompt_tokens", [[10], [100]])
def test_a_machine_slower_than_measured_is_noticed(slowness, prompt_tokens):
    slo = slowness * TIMES.decode_ms(8)
    fields = {"clients": 64, "prompt_tokens": prompt_tokens, "max_tokens": [64], "slowness": slowness}
    tpots = asyncio.run(Machine(slo, **fields).run(600))
    assert _p95(tpots) <= 1.15 * slo
    assert statistics.median(tpots) >= 0.5 * slo, "the seats were not used"


def test_the_simulation_catches_an_admission_without_promise():
    slo = TIMES.decode_ms(8)
    machine = Machine(None, clients=64, prompt_tokens=[100], max_tokens=[64])
    assert _p95(asyncio.run(machine.run(400))) > 1.15 * slo


def test_a_lone_client_never_waits():
    machine = Machine(TIMES.decode_ms(2), clients=1, prompt_tokens=[400], max_tokens=[20])
    asyncio.run(machine.run(5))
    assert machine.now < 5 * (0.3 + 20 * 0.012)
    assert machine.admission.waiting == 0
