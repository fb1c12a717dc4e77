"""Each condition of the target alone, with a clock that the test sets."""

import copy
from types import SimpleNamespace

import pytest
from tomoe_serving.admission.slots import Slot, SlotPool
from tomoe_serving.admission.slowdown import SlowdownEstimator
from tomoe_serving.admission.step_time import StepTimes
from tomoe_serving.admission.tpot_target import TARGET_SHARE, TpotTarget

TIMES = StepTimes(decode=((1, 10.0), (16, 40.0)), prefill=((1, 10.0), (100, 60.0)))


@pytest.fixture
def clock():
    return SimpleNamespace(now=0.0)


def make_target(clock, *, slo_ms=50.0, running=1, kv_capacity=10_000):
    """A target without slowdown, beside one slot of ``running`` sequences."""
    slots = SlotPool(max_sequences=16, kv_capacity=kv_capacity)
    if running:
        slots.add(Slot(running, 10, 10))
    return TpotTarget(TIMES, slo_ms, slots, lambda: clock.now, SlowdownEstimator(1.0))


def _state(target):
    return copy.deepcopy((vars(target.bucket), vars(target.slowdown), target.slots.running, target.slots.context))


def test_checking_changes_nothing(clock):
    target = make_target(clock)
    target.bucket.level_ms = 1.0
    before = _state(target)
    clock.now = 5.0
    target.fits(Slot(1, 50, 10))
    target.seconds_until(Slot(1, 50, 10))
    assert _state(target) == before


def test_cache_must_hold_the_newcomer(clock):
    target = make_target(clock, kv_capacity=60)
    assert target.fits(Slot(1, 30, 10))
    assert not target.fits(Slot(1, 31, 10))


def test_decode_with_the_newcomer_stays_within_the_target(clock):
    slo = TIMES.decode_ms(8) / TARGET_SHARE
    assert make_target(clock, slo_ms=slo + 1e-9, running=7).fits(Slot(1, 1, 1))
    assert not make_target(clock, slo_ms=slo + 1e-9, running=8).fits(Slot(1, 1, 1))


def test_slowdown_multiplies_the_measured_times(clock):
    target = make_target(clock, slo_ms=TIMES.decode_ms(8) / TARGET_SHARE, running=4)
    assert target.fits(Slot(1, 1, 1))
    target.slowdown.factor = 2.0
    assert not target.fits(Slot(1, 1, 1))


def test_bucket_must_hold_the_prefill(clock):
    target = make_target(clock)
    prompt = Slot(1, 100, 1)
    target.bucket.level_ms = TIMES.prefill_ms(100)
    assert target.fits(prompt)
    target.start(prompt)
    assert target.bucket.level_ms == 0
    assert not target.fits(prompt)


def test_refill_is_the_share_that_decoding_leaves(clock):
    target = make_target(clock, running=1)
    target.bucket.level_ms = 0.0
    clock.now = 0.1
    target.refill()
    assert target.bucket.level_ms == pytest.approx(100 * (1 - 10 / (TARGET_SHARE * 50)))


def test_seconds_until_the_bucket_holds_the_prefill(clock):
    target = make_target(clock)
    prompt = Slot(1, 100, 1)
    target.bucket.level_ms = 0.0
    seconds = target.seconds_until(prompt)
    clock.now += seconds - 0.002
    target.refill()
    assert not target.fits(prompt)
    clock.now += 0.002 + 1e-9
    target.refill()
    assert target.fits(prompt)
    assert target.seconds_until(prompt) is None


def test_no_time_helps_while_decoding_takes_all_of_it(clock):
    target = make_target(clock, slo_ms=10.0, running=8)
    target.bucket.level_ms = 0.0
    assert target.seconds_until(Slot(1, 100, 1)) is None


def test_the_first_slot_spends_nothing(clock):
    target = make_target(clock, running=0)
    target.start(Slot(1, 100, 1))
    assert target.bucket.level_ms == target.bucket.capacity_ms


def test_steps_of_several_sequences_are_observed_per_sequence(clock):
    target = make_target(clock, running=2)
    slot = Slot(2, 10, 10)
    slot.produced(2, 0.0)
    for now, is_slower in ((0.001 * TIMES.decode_ms(2) * 0.9, False), (0.001 * TIMES.decode_ms(2) * 1.1, True)):
        target.slowdown.factor = 1.0
        target.observe(slot, 2, now)
        assert (target.slowdown.factor > 1.0) is is_slower
