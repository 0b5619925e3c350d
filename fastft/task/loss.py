"""What a model is trained by, and scored by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fastft.task.data import Batch


@dataclass(frozen=True)
class Loss:
    """What a loss function returns.

    Attributes:
        total: scalar that is differentiated; a mean over the batch.
        parts: detached scalars to log, by name.
        predictions: what metrics compare with the batch, detached; a tensor, or a mapping of them.
        term: what of a training batch's loss this is, where that is a sum over what a batch to
            evaluate on holds one of, such as targets: evaluation adds up the means of all terms.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    predictions: Any = None
    term: str = ""


class LossFunction(Protocol):
    """Runs the model on a batch. Used for training and, without gradients, for evaluation.

    It must not read device values on the host (`.item()`, `if tensor:`), nor keep Python state. One
    that differentiates the model inside (forces) enables gradients itself.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> Loss: ...


class Criterion(Protocol):
    """The run file's `[loss]`: compares predictions with a batch's fields."""

    def __call__(self, predictions: Any, fields: Mapping[str, Any], /) -> Loss: ...


class Carry(Protocol):
    """How predictions become data, for `data.replay`; waits for nothing.

    The data sets say with an attribute `following` which sample is one step after each: indices, -1
    where there is none. Losses of batches with `leads` return predictions in training, too.

    An attribute `longest`, where there is one that is not None, is the most steps that a sample may
    be carried on where low-rank updates of the model's own are all that is trained.
    """

    def start(self, batch: Batch, states: Sequence[Any], /) -> Batch:
        """The batch with samples that start from their states; None: from the batch's data."""
        ...

    def states(self, batch: Batch, predictions: Any, /) -> Sequence[Any]:
        """What each sample starts from one step later: pytrees of detached tensors."""
        ...


class Metric(Protocol):
    """Accumulates over evaluation batches; kept on the device until `compute`."""

    def update(self, predictions: Any, batch: Batch, /) -> None: ...
    def compute(self) -> Mapping[str, float]: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class TextTable:
    """A table for the console, a row as long as `columns`; the first column is text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Report(Metric, Protocol):
    """What `fastft evaluate` computes and leaves in files, in place of the adapter's metrics.

    An adapter offers one by a method `report(options, sources)`: the run file's
    `[evaluate.options]` and its training data. It raises ConfigError for options that it does not
    take, and opens no data before `update`: `train` makes it too, to check the options.
    """

    def table(self) -> TextTable:
        """What the console shows of it; after `update`, as `compute` and `write`."""
        ...

    def write(self, folder: Path) -> None:
        """Writes tables and pictures into an empty folder."""
        ...
