"""Which samples a replay buffer draws: a pure function of seed, settings and step, as any order.

What the model made of a sample is in the buffer (`fastft.replay`), in the main process. Where a
sample is, and how far it was carried on, depends on the draws alone. So loader workers know ahead
which data belong to it: those of the sample that follows it in its data set, one step later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from fastft.config import ReplayConfig
from fastft.data.order import Picks, TrainingOrder
from fastft.data.randomness import Stream, make_generator
from fastft.data.sources import OpenSource
from fastft.errors import ConfigError


@dataclass(frozen=True)
class ReplayOrder:
    """Draws of slots without repetition within a batch; starting late goes through all before.

    Attributes:
        fresh: what empty slots are filled from, one sample at a time.
        following: for each data set, index of the sample one step after each; -1: there is none.
        batch_size: samples per batch.
        settings: of the buffer.
    """

    fresh: TrainingOrder
    following: Sequence[np.ndarray]
    batch_size: int
    settings: ReplayConfig

    def batches(self, first: int = 0) -> Iterator[Picks]:
        """Yields the picks of batches `first`, `first + 1`, ..., without end."""
        size, refresh = self.settings.size, self.settings.refresh
        fresh = self.fresh.batches()
        # Data set, index, steps carried on.
        slots: list[tuple[int, int, int] | None] = [None] * size
        for number in count():
            if number and number % refresh == 0:
                slots[(number // refresh - 1) % size] = None
            generator = make_generator(self.fresh.seed, Stream.REPLAY, number)
            drawn = generator.permutation(size)[: self.batch_size].tolist()
            entries = [slots[slot] or _first(next(fresh)) for slot in drawn]
            for slot, entry in zip(drawn, entries, strict=True):
                slots[slot] = self._carried_on(*entry)
            if number >= first:
                sources, indices, leads = zip(*entries, strict=True)
                yield Picks(
                    number * self.batch_size,
                    np.array(sources),
                    np.array(indices),
                    tuple(drawn),
                    leads,
                )

    def _carried_on(self, source: int, index: int, lead: int) -> tuple[int, int, int] | None:
        after = int(self.following[source][index])
        if after < 0 or lead + 1 >= self.settings.longest:
            return None
        return source, after, lead + 1


def make_replay_order(
    order: TrainingOrder, sources: Sequence[OpenSource], settings: ReplayConfig
) -> ReplayOrder:
    """The order of a run with a replay buffer.

    Raises:
        ConfigError: a data set does not say which sample follows which, or in none does any.
    """
    following = [getattr(source.raw, "following", None) for source in sources]
    if mute := [s.name for s, f in zip(sources, following, strict=True) if f is None]:
        raise ConfigError(
            f"data.replay: data sets must say which sample follows which (`following`); got none"
            f" from {', '.join(mute)}; leave data.replay out, or give the adapter's data set one"
        )
    if not any((np.asarray(each) >= 0).any() for each in following):
        raise ConfigError(
            "data.replay: samples must follow each other by one step of the model; got none that"
            " does; read data without gaps or strides, or leave data.replay out"
        )
    fresh = replace(order, batch_size=1, mixing="sample")
    return ReplayOrder(fresh, [np.asarray(f) for f in following], order.batch_size, settings)


def _first(picks: Picks) -> tuple[int, int, int]:
    return int(picks.sources[0]), int(picks.indices[0]), 0
