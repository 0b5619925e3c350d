"""The adapter: what the core asks for, each from the module that knows it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from metatrain.pet import PET
from torch import Tensor

from fastft.adapters.pet.baseline import fit_baseline
from fastft.adapters.pet.batch import collate
from fastft.adapters.pet.build import build_model, heads, unit_of
from fastft.adapters.pet.checkpoint import describe, save
from fastft.adapters.pet.checks import atoms_checks
from fastft.adapters.pet.data import Structures, open_structures, with_neighbours
from fastft.adapters.pet.loss import PetLoss
from fastft.adapters.pet.options import AtomsOptions, PetOptions
from fastft.adapters.pet.scores import PetScores
from fastft.config import DataSource
from fastft.errors import ConfigError
from fastft.runfile import parse
from fastft.task import (
    Criterion,
    DataCheck,
    Description,
    Loader,
    Sample,
    Split,
    Task,
)


class PetAdapter:
    """Upstream's PET, trained on energies and their derivatives."""

    Options: ClassVar[type] = PetOptions

    def __init__(self, options: PetOptions) -> None:
        self.options = options
        self._new: tuple[str, ...] = ()
        self._fits = False
        # Of what `build` made.
        self._cutoff, self._elements, self._unit, self._adaptive = 0.0, (), "", False
        # Training data by name, before neighbours are looked for.
        self._training: dict[str, Structures] = {}
        self.checks: Sequence[DataCheck] = atoms_checks(lambda: self._unit)

    def build(
        self,
        criterion: Criterion | None,
        *,
        device: torch.device,
        checkpoint: Path | None,
        pretrained: bool,
    ) -> Task:
        """The model under upstream's loss; `[loss]` must have no terms."""
        if criterion is not None:
            raise ConfigError(
                "loss.terms: must be absent, since the pet adapter has a loss of its own; got some;"
                " remove them, and see model.options.loss"
            )
        options = self.options
        model, self._new = build_model(options, checkpoint)
        known = checkpoint is not None and not self._new
        self._fits = options.fit == "always" or not known
        self._cutoff, self._elements = model.cutoff, tuple(model.atomic_types)
        self._unit = unit_of(model, options.target)
        self._adaptive = model.num_neighbors_adaptive is not None
        model.to(device)
        return Task(
            model=model,
            loss=PetLoss(options, (options.target,)),
            heads=heads(options.target),
            metrics={"errors": PetScores(self._unit)},
            low_rank=[name for name, _ in model.named_parameters() if ".lora_" in name],
            added=self._new,
            double_backward=options.forces or options.stress,
        )

    def weights(self, path: Path) -> Mapping[str, Tensor] | None:
        """Of a checkpoint of upstream's, as `build` made its model; None for any other file."""
        if path.suffix != ".ckpt":
            return None
        model, new = build_model(self.options, path)
        return {name: tensor for name, tensor in model.state_dict().items() if name not in new}

    def dataset(self, source: DataSource, split: Split) -> Structures:
        """A file that ASE reads."""
        options = parse(AtomsOptions, source.options, key=f"{source.path}: options")
        data = open_structures(
            source, options, forces=self.options.forces, stress=self.options.stress
        )
        if split == "train":
            self._training[source.name or str(source.path)] = data
        return data

    def transform(self, sample: Sample, split: Split) -> Sample:
        """The sample, in training turned at random, with its neighbours."""
        augment = self.options.augment and split == "train"
        return with_neighbours(
            sample, cutoff=self._cutoff, elements=self._elements, augment=augment
        )

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """See `fastft.adapters.pet.batch`."""
        options = self.options
        return collate(
            samples,
            dtype=getattr(torch, options.dtype),
            forces=options.forces,
            stress=options.stress,
            grid=not self._adaptive,
        )

    def prepare(self, task: Task, loader: Loader) -> None:
        """Fits composition energies and scale of a new target."""
        if self._fits:
            data = [self._training[source.name] for source in loader.sources]
            samples = [sample for each in data for sample in each.samples]
            fit_baseline(cast(PET, task.model), self.options.target, samples)

    def save(self, task: Task, path: Path) -> None:
        """A checkpoint for `mtt export`, `mtt eval` and `mtt train`."""
        save(cast(PET, task.model), path)

    def describe(self, path: Path) -> Description | None:
        """Targets, elements and sizes; None where the file is no checkpoint of upstream's."""
        return describe(path)
