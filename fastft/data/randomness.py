"""Random streams that are pure functions of a seed and a key.

Every stream is PCG64 seeded by `(seed, stream, *key)` through numpy's `SeedSequence`, so what one
part of a run draws never depends on what another drew before it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a stream of random numbers decides; another value is another run."""

    PASS = 1
    COUNTS = 2
    WINDOW = 3
    SAMPLE = 4
    COLLATE = 5
    CHECK = 6
    REPLAY = 7


def make_generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The stream's generator, at its start."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, *key))))


def seed_globals(seed: int, stream: Stream, *key: int) -> None:
    """Seeds `random`, `numpy.random` and torch's CPU generator, which transforms draw from."""
    words = np.random.SeedSequence((seed, stream, *key)).generate_state(4)
    number = int(words[0]) << 32 | int(words[1])
    random.seed(number)
    np.random.seed(words)  # noqa: NPY002 - transforms of other packages use the global generator
    # `torch.manual_seed` would also seed the GPUs, whose state belongs to training.
    torch.default_generator.manual_seed(number)


@contextmanager
def preserved_globals() -> Iterator[None]:
    """Gives the three global generators back their state at the end."""
    state = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        torch.default_generator.set_state(state[2])
