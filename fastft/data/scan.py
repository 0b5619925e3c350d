"""One pass over a data set that gathers all that the core's checks need."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastft.data.randomness import Stream, preserved_globals, seed_globals
from fastft.data.sources import ArrayData, OpenSource
from fastft.data.statistics import ChannelStatistics
from fastft.errors import AdapterError, DataError
from fastft.task import FieldSpec, Sample

# Arrays of at most this size are hashed whole: that takes some seconds.
HASHED_BYTES = 4 * 2**30


@dataclass
class Tally:
    """How often something was seen, and the first time."""

    count: int = 0
    example: str = ""

    def add(self, count: int, example: str) -> None:
        """Counts `count` more; `example` describes the first of them."""
        if count and not self.count:
            self.example = example
        self.count += count


@dataclass
class FieldScan:
    """One field of one data set.

    Attributes:
        spec: the model's expectations.
        present: indices of the samples that have it, None not counting.
        statistics: of numeric fields that hold no class indices, of the samples in `measured`.
        measured: indices of the samples in `statistics`, in order.
        is_float: whether values are floating-point numbers.
        label_counts: samples or pixels per class, `[classes]`.
    """

    spec: FieldSpec
    present: list[int] = field(default_factory=list)
    statistics: ChannelStatistics | None = None
    measured: list[int] = field(default_factory=list)
    is_float: bool = False
    label_counts: np.ndarray | None = None
    non_finite: Tally = field(default_factory=Tally)
    all_zero: Tally = field(default_factory=Tally)
    bad_shapes: Tally = field(default_factory=Tally)
    bad_labels: Tally = field(default_factory=Tally)
    ndim: int | None = None

    def add(self, index: int, value: Any) -> None:
        """Adds the value of sample `index`."""
        if value is None:
            return
        self.present.append(index)
        array = as_array(value)
        if array is None or array.size == 0:
            return
        self.is_float |= array.dtype.kind == "f"
        bad = array[~np.isfinite(array)]
        self.non_finite.add(bad.size, f"sample {index}: {bad[0]}" if bad.size else "")
        if self.spec.classes is not None:
            self._add_labels(index, array, self.spec.classes)
        elif array.dtype.kind != "b" and (channels := self._channels(index, array)) is not None:
            self.all_zero.add(int(array.size > 1 and not array.any()), f"sample {index}")
            self.statistics = self.statistics or ChannelStatistics(len(channels))
            self.statistics.add(channels)
            self.measured.append(index)

    def _channels(self, index: int, array: np.ndarray) -> np.ndarray | None:
        """The values as `[C, N]`; None, and noted, where the shape does not fit."""
        axis = self.spec.channel_axis
        self.ndim = array.ndim if self.ndim is None else self.ndim
        fits = array.ndim == self.ndim and (axis is None or -array.ndim <= axis < array.ndim)
        if fits:
            array_of_channels = array[None] if axis is None else np.moveaxis(array, axis, 0)
            channels = array_of_channels.reshape(len(array_of_channels), -1)
            known = self.statistics.mean.size if self.statistics else channel_count(self.spec)
            if known in (None, len(channels)):
                return channels
        self.bad_shapes.add(1, f"sample {index}: {list(array.shape)}")
        return None

    def _add_labels(self, index: int, array: np.ndarray, classes: int) -> None:
        ignored = self.spec.ignore_index
        labels = array.ravel() if ignored is None else array[array != ignored]
        good = (labels >= 0) & (labels < classes) & (array.dtype.kind in "iub")
        bad = labels[~good]
        self.bad_labels.add(bad.size, f"sample {index}: {bad[0]}" if bad.size else "")
        counts = np.bincount(labels[good].astype(np.int64), minlength=classes)
        self.label_counts = counts + (0 if self.label_counts is None else self.label_counts)


@dataclass
class SourceScan:
    """What one pass over a data set gathered.

    Attributes:
        source: the data set.
        indices: the samples that could be read.
        fields: by name.
        unreadable: samples that could not be read.
        digests: hash of the inputs -> first sample with it, of the samples in `indices`.
    """

    source: OpenSource
    indices: list[int] = field(default_factory=list)
    fields: dict[str, FieldScan] = field(default_factory=dict)
    unreadable: Tally = field(default_factory=Tally)
    digests: dict[bytes, int] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Data set and split, for messages."""
        return f"{self.source.name} ({self.source.split})"

    @property
    def complete(self) -> bool:
        """Whether every sample was read."""
        return len(self.indices) == len(self.source)


@dataclass(frozen=True)
class SeededSamples:
    """Transformed samples, the same at each pass whatever the global generators hold."""

    source: OpenSource
    indices: Sequence[int]

    def __iter__(self) -> Iterator[Sample]:
        for index in self.indices:
            with preserved_globals():
                seed_globals(0, Stream.CHECK, index)
                sample = self.source[index]
            yield sample


def scan_source(source: OpenSource, specs: Mapping[str, FieldSpec], max_samples: int) -> SourceScan:
    """Reads at most `max_samples` samples, evenly spaced so that sorted data is seen fairly.

    Raises:
        AdapterError: a field has statistics per channel but no channel axis.
    """
    for name, spec in specs.items():
        if (channel_count(spec) or 1) > 1 and spec.channel_axis is None:
            raise AdapterError(
                f"field '{name}': statistics per channel must come with a channel axis; got"
                f" {channel_count(spec)} channels; set FieldSpec.channel_axis"
            )
    scan = SourceScan(source)
    read = min(max_samples, len(source))
    for index in (number * len(source) // read for number in range(read)):
        try:
            with preserved_globals():
                seed_globals(0, Stream.CHECK, index)
                raw = source.read(index)
                # Augmentation would hide that two splits share a sample; and it may work in place.
                raw_digest = digest(raw, specs)
                sample = source.transform(index, raw)
        except DataError as error:
            scan.unreadable.add(1, error.problems[0])
            continue
        scan.indices.append(index)
        if inputs := raw_digest or digest(sample, specs):
            scan.digests.setdefault(inputs, index)
        for name, value in sample.items():
            if name not in scan.fields:
                scan.fields[name] = FieldScan(specs.get(name, FieldSpec()))
            scan.fields[name].add(index, value)
    return scan


def all_digests(scan: SourceScan, specs: Mapping[str, FieldSpec]) -> tuple[dict[bytes, int], float]:
    """Hashes of as many samples as is cheap, each with its first sample, and these samples' share.

    All samples of arrays up to `HASHED_BYTES`; of other data sets those that `scan_source` read.
    """
    source, read = scan.source, len(scan.indices) / len(scan.source)
    raw = source.raw
    if scan.complete or not scan.digests or not isinstance(raw, ArrayData):
        return scan.digests, read
    first = digest(source.read(0), specs)
    # Without hashable arrays before the transform, `scan_source` hashed what comes after it.
    if first is None or sum(array.nbytes for array in raw.arrays.values()) > HASHED_BYTES:
        return scan.digests, read
    digests: dict[bytes, int] = {}
    for index in range(len(source)):
        if found := digest(raw[index], specs):
            digests.setdefault(found, index)
    return digests, 1.0


def digest(sample: Sample, specs: Mapping[str, FieldSpec]) -> bytes | None:
    """Hash of the sample's arrays and floats, class indices aside; None where it has none."""
    arrays = {name: as_array(value) for name, value in _flat(sample)}
    inputs = {
        name: array
        for name, array in arrays.items()
        if array is not None
        and (array.ndim or array.dtype.kind == "f")
        and specs.get(name, FieldSpec()).classes is None
    }
    if not inputs:
        return None
    state = hashlib.blake2b(digest_size=16)
    for name, array in sorted(inputs.items()):
        state.update(f"{name} {array.dtype} {array.shape} ".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.digest()


def _flat(sample: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested fields, as ('surf.2t', array)."""
    for name, value in sample.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def as_array(value: Any) -> np.ndarray | None:
    """Numbers as an array, complex ones as their modulus; None for anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16.
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    elif not isinstance(value, (np.ndarray, np.generic, int, float)):
        return None
    array = np.asarray(value)
    if array.dtype.kind == "c":
        return np.abs(array)
    return array if array.dtype.kind in "fiub" else None


def channel_count(spec: FieldSpec) -> int | None:
    """Channels of the model's statistics; None where they are scalars or absent."""
    lengths = [np.size(v) for v in (spec.mean, spec.std) if v is not None and np.ndim(v)]
    return lengths[0] if lengths else None
