from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastft.config import DataSource
from fastft.task import (
    Criterion,
    DataCheck,
    Dataset,
    Description,
    Loader,
    Sample,
    Split,
    Task,
)


@dataclass
class FakeAdapter:
    """Stacks arrays; `change` is the transform, `open` what it reads itself."""

    Options = dict
    change: Callable[[dict[str, Any]], Sample] = dict
    open: Callable[[DataSource], Dataset] | None = None
    checks: Sequence[DataCheck] = field(default=())

    def build(
        self,
        criterion: Criterion | None,
        *,
        device: torch.device,
        checkpoint: Path | None,
        pretrained: bool,
    ) -> Task:
        return Task(nn.Identity(), loss=lambda model, batch: model(batch))

    def weights(self, path: Path) -> Mapping[str, Tensor] | None:
        return None

    def dataset(self, source: DataSource, split: Split) -> Dataset:
        assert self.open is not None
        return self.open(source)

    def transform(self, sample: Sample, split: Split) -> Sample:
        return self.change(dict(sample))

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        return {
            name: torch.from_numpy(np.stack([np.asarray(sample[name]) for sample in samples]))
            for name in samples[0]
        }

    def prepare(self, task: Task, loader: Loader) -> None: ...

    def save(self, task: Task, path: Path) -> None: ...

    def describe(self, path: Path) -> Description | None:
        return None


@pytest.fixture
def adapter_of() -> type[FakeAdapter]:
    return FakeAdapter


@pytest.fixture
def write_npz(tmp_path: Path) -> Callable[..., DataSource]:
    def write(file: str = "data.npz", weight: float = 1.0, **arrays: Any) -> DataSource:
        np.savez(tmp_path / file, **arrays)
        return DataSource(path=tmp_path / file, name=Path(file).stem, weight=weight)

    return write
