import pytest
from tomoe_serving.admission.bucket import PrefillBucket


def _bucket(level_ms=100.0):
    bucket = PrefillBucket(capacity_ms=100.0, refilled_at=10.0)
    bucket.level_ms = level_ms
    return bucket


def test_a_new_bucket_is_full():
    assert PrefillBucket(100.0, 0.0).level_ms == 100.0


@pytest.mark.parametrize(("rate", "level"), [(0.0, 0.0), (0.25, 50.0), (1.0, 100.0)])
def test_refill_adds_the_share_of_the_time_up_to_the_capacity(rate, level):
    bucket = _bucket(0.0)
    bucket.refill(10.2, rate)
    assert bucket.level_ms == pytest.approx(level)


def test_time_is_not_counted_twice():
    bucket = _bucket(0.0)
    for now in (10.01, 10.01, 10.02):
        bucket.refill(now, 1.0)
    assert bucket.level_ms == pytest.approx(20)


def test_missing_is_what_the_level_lacks():
    bucket = _bucket(30.0)
    assert bucket.missing_ms(50) == 20
    assert bucket.missing_ms(30) == 0
    assert bucket.level_ms == 30, "asking changed the level"


def test_a_prompt_longer_than_the_capacity_needs_a_full_bucket_and_overdraws_it():
    bucket = _bucket(99.0)
    assert bucket.missing_ms(250) == 1
    bucket.fill()
    assert bucket.missing_ms(250) == 0
    bucket.spend(250)
    assert bucket.level_ms == -150
    assert bucket.missing_ms(10) == 160
