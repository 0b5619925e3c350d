"""What a model is trained on: samples, batches, and what the checks of data find."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Split = Literal["train", "validation", "test"]

# One example: field name -> array, tensor or host value.
Sample = Mapping[str, Any]


class Dataset(Protocol):
    """A map-style data set; see `Carry` for what one must have for `data.replay`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Batch:
    """Collated samples.

    Attributes:
        data: field name -> tensor, or any pytree of tensors and host values (dates, names).
        size: samples in it.
        source: data set it was drawn from; empty where samples of several are mixed.
        lr_factor: learning rate over its peak in this step, for losses whose weights follow it.
        slots, leads: with `data.replay`, each sample's place in the buffer, and how many steps the
            model has carried it on.
    """

    data: Mapping[str, Any]
    size: int
    source: str = ""
    lr_factor: float = 1.0
    slots: tuple[int, ...] = ()
    leads: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`; copies from pinned memory do not wait."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(self, data=tree_map_only(Tensor, move, dict(self.data)))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked host memory; called by torch's DataLoader."""
        return replace(self, data=tree_map_only(Tensor, Tensor.pin_memory, dict(self.data)))


class NamedDataset(Dataset, Protocol):
    """A data set with the name it has in logs; its samples are transformed."""

    @property
    def name(self) -> str: ...


class Loader(Protocol):
    """Yields the batches of steps `first`, `first + 1`, ...; each depends on its step alone.

    Attributes:
        sources: the data sets, to go over once and in order.
        samples: of all of them together.
    """

    @property
    def sources(self) -> Sequence[NamedDataset]: ...
    @property
    def samples(self) -> int: ...
    def batches(self, first: int = 0) -> Iterable[Batch]: ...
    def example(self) -> Batch: ...


@dataclass(frozen=True)
class FieldSpec:
    """What the model expects of one field of a (transformed) sample; read by the data checks.

    Attributes:
        mean, std: statistics that the model's normalisation assumes, scalars or one per channel.
        channel_axis: axis of a sample's array that `mean` and `std` run along.
        classes: number of classes, where the field holds class indices.
        ignore_index: label that does not count.
    """

    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    channel_axis: int | None = None
    classes: int | None = None
    ignore_index: int | None = None


@dataclass(frozen=True)
class Finding:
    """What a data check found.

    Attributes:
        check: the check's name, as in `data.checks.ignore`.
        severity: an 'error' stops the run, a 'warning' is printed.
        where: data set and field.
        what: the problem, with numbers.
        count: values or samples concerned.
        example: one of them, with its index.
        advice: what to do.
    """

    check: str
    severity: Literal["error", "warning"]
    where: str
    what: str
    count: int
    example: str
    advice: str


@dataclass(frozen=True)
class CheckData:
    """What a data check reads: samples after the adapter's transform, read anew at each pass.

    Attributes:
        sources: (data set name, split, samples), at most `data.checks.max_samples` of each.
        fields: the model's expectations.
    """

    sources: Sequence[tuple[str, Split, Iterable[Sample]]]
    fields: Mapping[str, FieldSpec]


# The function's name, dashes for underscores, is the check's name in `data.checks.ignore` and in
# its findings: `energy_bias` yields `Finding(check="energy-bias", ...)`.
DataCheck = Callable[[CheckData], Iterable[Finding]]
