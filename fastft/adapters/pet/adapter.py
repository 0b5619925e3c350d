"""The adapter: what the core asks for, each from the module that knows it."""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from fastft_kernels.device import by_default
from metatrain.pet import PET
from torch import Tensor

from fastft.adapters.criterion import refuse_terms
from fastft.adapters.pet.baseline import composition, fit_baseline
from fastft.adapters.pet.batch import collate
from fastft.adapters.pet.build import build_model, start_anew, trained_by_heads
from fastft.adapters.pet.checkpoint import SUFFIX, describe, save
from fastft.adapters.pet.checks import atoms_checks
from fastft.adapters.pet.data import Structures, open_structures, with_neighbours
from fastft.adapters.pet.energy import make_block
from fastft.adapters.pet.fused import use_kernels
from fastft.adapters.pet.lora import low_rank_names, merge_updates
from fastft.adapters.pet.loss import PetLoss
from fastft.adapters.pet.options import PetOptions
from fastft.adapters.pet.pairs import adaptive_settings, with_near_pairs
from fastft.adapters.pet.presets import optim_presets
from fastft.adapters.pet.scores import PetScores
from fastft.adapters.pet.targets import (
    RunTargets,
    atoms_options,
    find_targets,
    heads,
    last_layers,
    rename_to_energy,
    rescale_heads,
    settings_of,
    unit_of,
)
from fastft.adapters.pet.unit_checks import Reference
from fastft.config import DataConfig, DataSource, ModelConfig, NewHead, random_heads
from fastft.task import (
    Conversion,
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
        self.targets = RunTargets((options.target,))
        # The run file's new heads at random.
        self._random: list[str] = []
        # Of what `build` made.
        self._cutoff, self._elements = 0.0, ()
        self._adaptive: dict[str, Any] | None = None
        self._units: dict[str, str] = {}
        self._fitted: tuple[str, ...] = ()
        # Last layers by target.
        self._rescaled: dict[str, list[str]] = {}
        # Training data by name, before neighbours are looked for.
        self._training: dict[str, Structures] = {}
        self._model: PET | None = None
        self._new: tuple[str, ...] = ()
        self.checks: Sequence[DataCheck] = atoms_checks(self._units, self._reference)

    @classmethod
    def optim_presets(
        cls, options: PetOptions, model: ModelConfig, new_heads: Collection[str]
    ) -> Mapping[str, Any]:
        """See `fastft.adapters.pet.presets`."""
        return optim_presets()

    @classmethod
    def convert(cls, path: Path) -> Conversion:
        """See `fastft.adapters.pet.convert`."""
        # Upstream's reader of options is slow to import, warns then, and nothing else needs it.
        with warnings.catch_warnings(action="ignore"):
            from fastft.adapters.pet.convert import convert

        return convert(path)

    def expect(self, data: DataConfig, new_heads: Mapping[str, NewHead]) -> None:
        """The run's targets are those of its data sets; heads at random have no old potential."""
        self._random = random_heads(new_heads)
        self.targets = find_targets(self.options, data)

    def build(
        self,
        criterion: Criterion | None,
        *,
        device: torch.device,
        checkpoint: Path | None,
        pretrained: bool,
    ) -> Task:
        """The model under upstream's loss; `[loss]` must have no terms."""
        advice = "remove them, and see model.options.loss"
        refuse_terms(criterion, "the pet adapter has a loss of its own", advice)
        options, targets = self.options, self.targets
        built = build_model(options, targets, checkpoint)
        model = built.model
        self._fitted = targets.trained if options.fit == "always" else built.fresh
        random = [
            name for name in built.fresh if settings_of(options, name)[1].inherit_heads is None
        ]
        self._rescaled = {
            name: last_layers(name, self._random)
            for name in self._fitted
            if options.rescale_heads and name not in random
        }
        notes = [
            f"target '{name}': its heads that start at random by finetune.new_heads are not"
            " rescaled"
            for name, layers in self._rescaled.items()
            if layers != last_layers(name)
        ]
        self._cutoff, self._elements = model.cutoff, tuple(model.atomic_types)
        # The checks hold the dict.
        self._units.clear()
        self._units.update({name: unit_of(model, name) for name in targets.names})
        self._model, self._new = model, built.new
        self._adaptive = adaptive_settings(model)
        model.to(device)
        if options.kernels == "auto" and by_default(device) and options.dtype == "float32":
            use_kernels(model)
        return Task(
            model=model,
            loss=PetLoss(options, targets.names, mixed=targets.mixed),
            blocks=[make_block(model)],
            heads=trained_by_heads(model, options, targets.trained),
            metrics={"errors": PetScores(self._units)},
            low_rank=low_rank_names(model),
            added=built.new,
            double_backward=options.forces or options.stress,
            new_heads=heads(built.fresh),
            notes=[*built.notes, *notes],
        )

    def weights(self, path: Path) -> Mapping[str, Tensor] | None:
        """Of a checkpoint of upstream's, which `build` has read; None for any other file.

        The model is left at random, so that what the core does not fill starts anew.
        """
        if path.suffix != SUFFIX:
            return None
        assert self._model is not None
        state = self._model.state_dict().items()
        tensors = {name: tensor.clone() for name, tensor in state if name not in self._new}
        start_anew(self._model, tensors)
        return tensors

    def dataset(self, source: DataSource, split: Split) -> Structures:
        """A file that ASE reads."""
        options = atoms_options(source)
        data = open_structures(
            source,
            options,
            target=self.targets.names.index(options.target or self.options.target),
            forces=self.options.forces and "forces" not in options.lacks,
            stress=self.options.stress and "stress" not in options.lacks,
        )
        if split == "train":
            self._training[source.name or str(source.path)] = data
        return data

    def transform(self, sample: Sample, split: Split) -> Sample:
        """The sample, in training turned at random, with its neighbours."""
        augment = self.options.augment and split == "train"
        sample = with_neighbours(
            sample, cutoff=self._cutoff, elements=self._elements, augment=augment
        )
        sample = sample if self._adaptive is None else with_near_pairs(sample, self._adaptive)
        return {**sample, "split": split}

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """See `fastft.adapters.pet.batch`."""
        options = self.options
        return collate(
            [{"target": sample["structure"]["target"], **sample} for sample in samples],
            dtype=getattr(torch, options.dtype),
            forces=options.forces,
            stress=options.stress,
            fill=options.fill_batches and all(sample["split"] == "train" for sample in samples),
        )

    def prepare(self, task: Task, loader: Loader) -> None:
        """Fits composition energies and scales of new targets, each to its own data sets.

        Heads that are not at random go on saying what they said (`rescale_heads`). Where a run
        goes on, its scale is loaded before, and the same data give the same: nothing changes.
        """
        model = cast(PET, task.model)
        data = [self._training[source.name] for source in loader.sources]
        for target in self._fitted:
            index = self.targets.names.index(target)
            samples = [sample for each in data if each.target == index for sample in each.samples]
            _, before = composition(model, target)
            fit_baseline(model, target, samples)
            _, scale = composition(model, target)
            if target in self._rescaled:
                rescale_heads(model, self._rescaled[target], before / scale)

    def _reference(self, target: int) -> Reference | None:
        """Of a target that keeps its composition energies and scale."""
        name = self.targets.names[target]
        if self._model is None or name in self._fitted:
            return None
        return Reference(*composition(self._model, name))

    def save(self, task: Task, path: Path) -> None:
        """A checkpoint for `mtt export`, `mtt eval` and `mtt train`."""
        model, options = cast(PET, task.model), self.options
        merge = options.lora is not None and options.lora.merge
        if merge or options.export_as_energy is not None:
            model = copy.deepcopy(model)
        if merge:
            merge_updates(model)
        if options.export_as_energy is not None:
            rename_to_energy(model, options.export_as_energy)
        save(model, path)

    def describe(self, path: Path) -> Description | None:
        """Targets, elements and sizes; None where the file is no checkpoint of upstream's."""
        return describe(path)
