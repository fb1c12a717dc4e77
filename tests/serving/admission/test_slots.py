import pytest
from tomoe_serving.admission.slots import OutputMeans, Slot, SlotPool


def test_pool_counts_sequences_context_and_cache():
    pool = SlotPool(max_sequences=4, kv_capacity=100)
    one, three = Slot(1, 10, 20), Slot(3, 5, 10)
    pool.add(one)
    pool.add(three)
    assert (pool.running, pool.free, pool.kv_reserved) == (4, 0, 30 + 3 * 15)
    assert pool.context == 20 + 3 * 10
    assert one in pool
    pool.remove(three)
    assert (pool.running, pool.free, pool.kv_reserved, pool.context) == (1, 3, 30, 20)
    pool.remove(one)
    assert pool.is_empty


def test_free_is_not_negative():
    pool = SlotPool(max_sequences=2, kv_capacity=100)
    pool.add(Slot(5, 1, 1))
    assert pool.free == 0


@pytest.mark.parametrize(("tokens", "fits"), [(70, True), (71, False)])
def test_cache_must_hold_the_prompt_and_the_token_limit(tokens, fits):
    pool = SlotPool(max_sequences=9, kv_capacity=100)
    pool.add(Slot(1, 10, 20))
    assert pool.fits_cache(Slot(1, tokens - 10, 10)) is fits


def test_tpot_counts_what_came_after_the_first_arrival():
    slot = Slot(1, 10, 10)
    slot.produced(2, 1.0)
    assert slot.tpot_ms is None
    slot.produced(1, 1.1)
    slot.produced(3, 1.4)
    assert slot.tpot_ms == pytest.approx(100)


def test_tpot_is_per_sequence():
    slot = Slot(2, 10, 10)
    for step in range(6):
        slot.produced(2, 0.05 * step)
    assert slot.tpot_ms == pytest.approx(50)


def test_means_move_a_tenth_of_the_way():
    means = OutputMeans()
    for tokens, seconds in ((11, 1.0), (11, 2.0)):
        slot = Slot(1, 10, 10)
        slot.produced(1, 0.0)
        slot.produced(tokens - 1, seconds)
        means.add(slot)
    assert means.tpot_ms == pytest.approx(100 + 0.1 * 100)
    assert means.tokens == pytest.approx(11 + 0.9**2 * (128 - 11))


def test_a_slot_without_tokens_changes_no_mean():
    means = OutputMeans()
    means.add(Slot(1, 10, 10))
    assert (means.tokens, means.tpot_ms) == (128, None)
