"""Random streams as pure functions of the run's seed and a position: no random state is stored or shared."""

from enum import IntEnum

import numpy as np
import torch


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
    return np.random.default_rng(_sequence(seed, stream, position))


def generator_on(
    device: torch.device, seed: int, stream: Stream, *position: int
) -> np.random.Generator | torch.Generator:
    """Generator of one stream at one position that draws on ``device``: other numbers on a CPU than on a GPU.

    A GPU's generator is counter-based (Philox): a new seed costs nothing, and drawing does not wait for the device.
    """
    if device.type == "cpu":
        return generator(seed, stream, *position)
    (key,) = _sequence(seed, stream, position).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(key))


def _sequence(seed: int, stream: Stream, position: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(stream, *position))
