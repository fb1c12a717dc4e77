"""Random streams: pure functions of seed, stream and position, all different."""

import itertools

import pytest
from tomoe_training.seeds import Stream, generator


def test_stream_is_a_pure_function_of_its_position():
    first = generator(3, Stream.DATA_ORDER, 1, 2).random(4)
    assert (generator(3, Stream.DATA_ORDER, 1, 2).random(4) == first).all()


def test_streams_of_different_seeds_uses_and_positions_differ():
    seeds = (0, 1, 2**32, 2**32 + 1)
    positions = ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
    keys = list(itertools.product(seeds, Stream, positions))
    draws = {tuple(generator(seed, stream, *position).integers(2**63, size=2)) for seed, stream, position in keys}
    assert len(draws) == len(keys)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        generator(-1, Stream.DATA_ORDER)
