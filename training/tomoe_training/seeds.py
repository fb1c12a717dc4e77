"""Random streams as pure functions of the run's seed and a position: no random state is stored or shared."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a stream is used for. The values are part of a run's meaning: see ``training_state.VERSION``."""

    DATA_ORDER = 0
    SHARED_NOISE = 1
    SEQUENCE_NOISE = 2


def generator(seed: int, stream: Stream, *position: int) -> np.random.Generator:
    """Generator of one stream at one position, such as (step, sequence); ``seed`` and positions are >= 0.

    ``numpy.random.SeedSequence`` hashes all of them, so that neighbours are independent. The key is a
    ``spawn_key`` because SeedSequence pads entropy with zeros: ``[s, 1]`` and ``[s, 1, 0]`` would be the same.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *position)))
