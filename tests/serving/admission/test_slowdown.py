import random

import pytest
from tomoe_serving.admission.slowdown import FIRST_FACTOR, SlowdownEstimator


@pytest.mark.parametrize("median", [1.2, 3.0])
def test_estimate_settles_at_the_median_ratio(median):
    generator = random.Random(0)
    estimator = SlowdownEstimator()
    for _ in range(2000):
        ratio = median * (0.9 if generator.random() < 0.5 else 10.0 if generator.random() < 0.2 else 1.1)
        estimator.observe(20 * ratio, 20)
    assert estimator.factor == pytest.approx(median, rel=0.15)


def test_one_late_step_moves_the_estimate_by_one_percent():
    estimator = SlowdownEstimator()
    estimator.observe(1e9, 20)
    assert estimator.factor == pytest.approx(1.01 * FIRST_FACTOR)


def test_estimate_is_never_below_the_measurement():
    estimator = SlowdownEstimator()
    for _ in range(200):
        estimator.observe(1, 20)
    assert estimator.factor == 1.0
