"""Loaders: batches that depend on seed, settings and step alone.

Any number of workers and any restart point give the same bits: `order` says what a batch holds,
and the global random generators are seeded from the sample's number in the stream before each
read and transform, in a worker or in the main process alike.

Workers ignore SIGTERM and SIGINT, which schedulers and terminals send to all processes of a run:
the main process decides when the run ends.
"""

import atexit
import signal
import sys
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset

from fastft.config import DataConfig, DataSource
from fastft.data.order import EvaluationOrder, Order, Picks, TrainingOrder
from fastft.data.randomness import Stream, preserved_globals, seed_globals
from fastft.data.replay import make_replay_order
from fastft.data.sources import OpenSource, open_sources
from fastft.errors import DataError
from fastft.task import Adapter, Batch, Split

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class ReadingOptions:
    """How batches are read; changes the speed only."""

    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False


class SourceLoader:
    """A `task.Loader` over opened data sets.

    Attributes:
        sources: the data sets.
        names: theirs, as in `Batch.source`, logs and messages.
        samples: samples per pass over all data sets.
    """

    def __init__(
        self,
        sources: Sequence[OpenSource],
        order: Order,
        seed: int,
        options: ReadingOptions,
        mixed: bool = False,
    ) -> None:
        self.sources = tuple(sources)
        self.names = tuple(source.name for source in sources)
        self.samples = sum(len(source) for source in sources)
        self._reader = _BatchReader(self.sources, seed, mixed)
        self._order = order
        self._options = options
        self._running: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()
        _loaders.add(self)

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yields the batches of steps `first`, `first + 1`, ...

        Workers start at the first batch and end with the iterator.

        Raises:
            DataError: a sample cannot be read; names data set and index.
        """
        batches = self._read(first)
        self._running.add(batches)
        return batches

    def example(self) -> Batch:
        """The batch of step 0, read in this process; disturbs neither iterators nor generators."""
        return _unwrap(self._reader[next(self._order.batches())])

    def examples(self) -> Iterator[Batch]:
        """The first batch of each data set, read as by `example`; of data to evaluate on."""
        seen: set[int] = set()
        for picks in self._order.batches():
            if (source := int(picks.sources[0])) not in seen:
                seen.add(source)
                yield _unwrap(self._reader[picks])

    def close(self) -> None:
        """Ends the iterators that are still running, and their workers."""
        for batches in list(self._running):
            batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, first: int) -> Generator[Batch]:
        workers = self._options.workers
        loader = DataLoader(
            self._reader,
            batch_size=None,
            sampler=self._order.batches(first),  # pyright: ignore[reportArgumentType]
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self._options.pin_memory,
            prefetch_factor=self._options.prefetch if workers else None,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=_ignore_stop_signals,
            # Otherwise each iterator draws its workers' seed from the global generator.
            generator=torch.Generator(),
        )
        # Workers are forked with the signals blocked: none dies before it ignores them.
        with _stop_signals_blocked():
            iterator = iter(loader)
        try:
            for batch in iterator:
                yield _unwrap(batch)
        finally:
            # It has no public close, and waiting for its deletion leaves the workers running for as
            # long as someone keeps a traceback.
            if workers:
                getattr(iterator, "_shutdown_workers")()  # noqa: B009
                # It ends workers that are stuck by SIGTERM.
                for worker in getattr(iterator, "_workers"):  # noqa: B009
                    worker.kill()


_loaders: weakref.WeakSet[SourceLoader] = weakref.WeakSet()


# Before multiprocessing's own handler, which was registered earlier: that one ends workers by
# SIGTERM and waits for them.
@atexit.register
def _close_loaders() -> None:
    for loader in list(_loaders):
        loader.close()


class _BatchReader(Dataset[Batch | DataError]):
    """Map-style data set for torch's DataLoader: picks -> batch.

    A DataError is returned, not raised: DataLoader would rebuild one raised in a worker with the
    worker's traceback as its message.
    """

    def __init__(self, sources: Sequence[OpenSource], seed: int, mixed: bool) -> None:
        self._sources = sources
        self._seed = seed
        self._mixed = mixed

    def __getitem__(self, picks: Picks) -> Batch | DataError:
        with preserved_globals():
            try:
                return self._batch(picks)
            except DataError as error:
                return error

    def _batch(self, picks: Picks) -> Batch:
        places = list(zip(picks.sources.tolist(), picks.indices.tolist(), strict=True))
        samples = []
        for number, (source, index) in enumerate(places, start=picks.first):
            seed_globals(self._seed, Stream.SAMPLE, number)
            samples.append(self._sources[source][index])
        seed_globals(self._seed, Stream.COLLATE, picks.first)
        first = self._sources[places[0][0]]
        try:
            data = first.adapter.collate(samples)
        except Exception as error:
            listed = ", ".join(f"{self._sources[s].name}[{index}]" for s, index in places)
            error.add_note(f"while collating the samples {listed}")
            raise
        return Batch(
            data,
            size=len(samples),
            source="" if self._mixed else first.name,
            slots=picks.slots,
            leads=picks.leads,
        )


def open_loader(
    adapter: Adapter, data: DataConfig, *, seed: int, device: torch.device
) -> SourceLoader:
    """Opens the training data: infinite batches of exactly `data.batch_size` samples.

    Raises:
        DataError: a data set cannot be opened, or all of them together do not fill a batch.
        ConfigError: two data sets share a name, or one is none for `data.replay`.
    """
    sources = open_sources(adapter, data.train, "train")
    sizes = [len(source) for source in sources]
    if data.micro_batch > sum(sizes):
        raise DataError(
            f"data.batch_size: must not exceed the {sum(sizes)} training samples;"
            f" got {data.micro_batch}; lower it or add data"
        )
    order = TrainingOrder(
        sizes, [source.weight for source in sources], data.micro_batch, data.mixing, seed
    )
    mixed = len(sources) > 1 and data.mixing == "sample"
    if data.replay is not None:
        order = make_replay_order(order, sources, data.replay)
        mixed = len(sources) > 1
    return SourceLoader(sources, order, seed, _options(data, device), mixed)


def open_evaluation(
    adapter: Adapter,
    sources: Sequence[DataSource],
    data: DataConfig,
    *,
    device: torch.device,
    split: Split = "validation",
    seed: int = 0,
) -> SourceLoader:
    """Opens data to evaluate on: one pass in order, each batch from one data set, last ones short.

    Args:
        seed: of transforms that are random in evaluation too; every pass draws the same.

    Raises:
        DataError: a data set cannot be opened.
        ConfigError: two data sets share a name.
    """
    opened = open_sources(adapter, sources, split)
    size = data.evaluation_batch_size or data.micro_batch
    order = EvaluationOrder([len(source) for source in opened], size)
    return SourceLoader(opened, order, seed, _options(data, device))


def _options(data: DataConfig, device: torch.device) -> ReadingOptions:
    return ReadingOptions(data.workers, data.prefetch, pin_memory=device.type == "cuda")


def _unwrap(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _ignore_stop_signals(worker: int) -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(batch: Any) -> Any:
    return batch
