"""Which samples make up which batch, as a pure function of seed, settings and step.

Training is an infinite stream of draws. Each draw names a data set; a data set answers with the
next sample of its current pass, and every pass is a new permutation of all its samples. So a
sample comes up once per pass whatever the weights, and batches straddle passes (nothing is
dropped, no batch is short).

To start at step `k` in little time, the draws are cut into windows of `WINDOW` batches. How many
draws of a window fall to each data set is multinomial, and their order within the window is a
random permutation: together exactly independent draws by weight. Skipping a window then costs one
multinomial draw, not one per sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Literal, Protocol

import numpy as np

from fastft.data.randomness import Stream, make_generator

WINDOW = 256


@dataclass(frozen=True, eq=False)
class Picks:
    """The samples of one batch.

    Attributes:
        first: number of the batch's first sample in the stream; seeds the transforms.
        sources: data set of each sample, int64 `[B]`.
        indices: index of each sample in its data set, int64 `[B]`.
        slots, leads: with `data.replay`, each sample's place in the buffer, and how many steps it
            was carried on.
    """

    first: int
    sources: np.ndarray
    indices: np.ndarray
    slots: tuple[int, ...] = ()
    leads: tuple[int, ...] = ()


class Order(Protocol):
    """Which samples make up which batch."""

    def batches(self, first: int = 0) -> Iterator[Picks]:
        """Yields the picks of batches `first`, `first + 1`, ..."""
        ...


@dataclass(frozen=True)
class TrainingOrder:
    """The infinite training stream.

    Attributes:
        sizes: samples in each data set, all positive.
        weights: share of each data set, up to a common factor.
        batch_size: samples per batch.
        mixing: whether a data set is drawn for every sample or for every batch.
        seed: of the run.
    """

    sizes: Sequence[int]
    weights: Sequence[float]
    batch_size: int
    mixing: Literal["sample", "batch"]
    seed: int

    def batches(self, first: int = 0) -> Iterator[Picks]:
        """Yields the picks of batches `first`, `first + 1`, ..., without end."""
        passes = _Passes(self.sizes, self.seed)
        window, skip = divmod(first, WINDOW)
        windows = self._windows(window)
        for step, (sources, turns) in enumerate(_skip_rows(windows, skip), start=first):
            yield Picks(step * self.batch_size, sources, passes.indices(sources, turns))

    def _windows(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields, per window, data sets and turns `[WINDOW, B]`.

        A turn counts the samples that its data set gave before, since step 0.
        """
        samples_per_draw = self.batch_size if self.mixing == "batch" else 1
        draws = WINDOW * self.batch_size // samples_per_draw
        shares = np.asarray(self.weights, np.float64) / np.sum(self.weights)
        generator = make_generator(self.seed, Stream.COUNTS)
        taken = generator.multinomial(draws, shares, size=first).sum(axis=0)
        for window in count(first):
            counts = generator.multinomial(draws, shares)
            ordered = np.repeat(np.arange(len(shares)), counts)
            sources = make_generator(self.seed, Stream.WINDOW, window).permutation(ordered)
            turns = np.empty_like(sources)
            for source, n in enumerate(counts):
                turns[sources == source] = taken[source] + np.arange(n)
            taken = taken + counts
            # One row per draw, one column per sample of it.
            sources = np.repeat(sources[:, None], samples_per_draw, axis=1)
            turns = turns[:, None] * samples_per_draw + np.arange(samples_per_draw)
            yield sources.reshape(WINDOW, -1), turns.reshape(WINDOW, -1)


@dataclass(frozen=True)
class EvaluationOrder:
    """One pass in order; a batch holds samples of one data set, whose last batch may be short."""

    sizes: Sequence[int]
    batch_size: int

    def batches(self, first: int = 0) -> Iterator[Picks]:
        """Yields the picks of batches `first`, `first + 1`, ... up to the end of the data."""
        return islice(self._all_batches(), first, None)

    def _all_batches(self) -> Iterator[Picks]:
        before = 0
        for source, size in enumerate(self.sizes):
            for start in range(0, size, self.batch_size):
                indices = np.arange(start, min(start + self.batch_size, size))
                yield Picks(before + start, np.full_like(indices, source), indices)
            before += size


@dataclass(frozen=True)
class _Passes:
    """The permutations of every data set's passes; keeps the latest of each data set."""

    sizes: Sequence[int]
    seed: int
    latest: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)

    def indices(self, sources: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Sample indices `[B]` of data sets `[B]` at turns `[B]`."""
        passes, places = np.divmod(turns, np.asarray(self.sizes)[sources])
        indices = np.empty_like(places)
        for source, number in sorted(set(zip(sources.tolist(), passes.tolist(), strict=True))):
            here = (sources == source) & (passes == number)
            indices[here] = self._permutation(source, number)[places[here]]
        return indices

    def _permutation(self, source: int, number: int) -> np.ndarray:
        if self.latest.get(source, (-1,))[0] != number:
            generator = make_generator(self.seed, Stream.PASS, source, number)
            self.latest[source] = number, generator.permutation(self.sizes[source])
        return self.latest[source][1]


def _skip_rows(
    windows: Iterator[tuple[np.ndarray, np.ndarray]], skip: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of all windows but the first `skip`."""
    rows = ((s, t) for sources, turns in windows for s, t in zip(sources, turns, strict=True))
    return islice(rows, skip, None)
