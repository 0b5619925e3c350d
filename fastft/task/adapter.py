"""A model family: what makes tasks, opens its data, and reads and writes its checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastft.config import DataSource
from fastft.task.data import DataCheck, Dataset, Loader, Sample, Split
from fastft.task.loss import Criterion
from fastft.task.model import Task


@dataclass(frozen=True)
class Description:
    """What `fastft show` prints of a checkpoint: a title and rows of (name, value)."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Conversion:
    """Another program's options as a run file, which an adapter's class method `convert` makes.

    Attributes:
        run: the run file as a tree of tables, arrays and values.
        notes: what has no counterpart in it, or does something else.
    """

    run: Mapping[str, Any]
    notes: Sequence[str] = ()


class Adapter(Protocol):
    """A model family. Made with its parsed options: `adapter = Adapter(options)`.

    What only some families have is not listed here: `expect`, `optim_presets`, `report`,
    `statistics` and `convert`, in CONTRIBUTING.md ("Writing an adapter").

    Attributes:
        Options: pydantic dataclass that checks `[model.options]`.
        checks: data checks beside the core's.
    """

    Options: ClassVar[type]
    checks: Sequence[DataCheck]

    def build(
        self,
        criterion: Criterion | None,
        *,
        device: torch.device,
        checkpoint: Path | None,
        pretrained: bool,
    ) -> Task:
        """The task with freshly initialised weights on `device`.

        Args:
            criterion: the run file's `[loss]`, None where it has no terms.
            checkpoint: `model.checkpoint`, for families whose checkpoints say the architecture.
            pretrained: False where weights will be loaded over everything, so that none need be
                fetched from a hub.
        """
        ...

    def weights(self, path: Path) -> Mapping[str, Tensor] | None:
        """The checkpoint's tensors under this model's names; None: the core reads the file."""
        ...

    def dataset(self, source: DataSource, split: Split) -> Dataset:
        """Opens a data set in the family's own format (`format = "adapter"`)."""
        ...

    def transform(self, sample: Sample, split: Split) -> Sample:
        """One raw sample as the model takes it; runs in loader workers, with seeded global RNGs."""
        ...

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """Samples as one batch; runs in loader workers."""
        ...

    def prepare(self, task: Task, loader: Loader) -> None:
        """What depends on the data, before the optimizer is made: energy bias, statistics."""
        ...

    def save(self, task: Task, path: Path) -> None:
        """Writes the checkpoint that the family's own tools open."""
        ...

    def describe(self, path: Path) -> Description | None:
        """The family's view of a checkpoint; None: the core's table of tensors."""
        ...
