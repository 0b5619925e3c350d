"""The adapter: what the core asks for, each from the module that knows it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from fastft_kernels.device import by_default
from torch import Tensor

from fastft.adapters.aurora.batch import collate
from fastft.adapters.aurora.blocks import blocks, keep_backbone_in_bf16
from fastft.adapters.aurora.build import (
    argument,
    build_model,
    constructor_arguments,
    embedding_notes,
    heads,
    longest_carried,
    low_rank,
    low_rank_notes,
    make_variables,
    make_variant,
    new_parameters,
    timestep_hours,
    told_step,
)
from fastft.adapters.aurora.carry import AuroraCarry
from fastft.adapters.aurora.checkpoint import describe, load_hub, read_weights, save
from fastft.adapters.aurora.checks import weather_checks
from fastft.adapters.aurora.data import WeatherData, open_weather
from fastft.adapters.aurora.extend import extend, place_of
from fastft.adapters.aurora.fused import use_kernels
from fastft.adapters.aurora.loss import AuroraLoss
from fastft.adapters.aurora.options import AuroraOptions
from fastft.adapters.aurora.presets import optim_presets
from fastft.adapters.aurora.report import WeatherReport, WeatherReportOptions
from fastft.adapters.aurora.scores import WeatherScores
from fastft.adapters.aurora.stats import compute_statistics, format_statistics
from fastft.adapters.criterion import refuse_terms
from fastft.adapters.unused import unused_weights
from fastft.config import DataConfig, DataSource, ModelConfig, NewHead
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

_STATISTICS_OF_ALL = """\
# model.options has no table of new variables, such as surf_vars = { tp = {} }. These are of all, to
# compare with the model's: pretrained weights expect those that they were trained with.
"""


class AuroraAdapter:
    """Aurora's classes, with the paper's loss.

    Precision: the trainer's autocast is around the loss, and upstream's own switches stay off. With
    `autocast = "backbone"`, encoder and decoder are kept out of it, as in upstream's recipe.

    Freezing is up to `finetune.method`, also with the low-rank updates that upstream's classes
    bring (`arguments.use_lora`), which freeze nothing.
    """

    Options: ClassVar[type] = AuroraOptions

    def __init__(self, options: AuroraOptions) -> None:
        self.options = options
        self._new_heads: Mapping[str, NewHead] = {}
        # Of what `build` made.
        self._added: Sequence[str] = ()
        self._place = ""
        # Both raise ConfigError; before data are opened.
        constructor_arguments(options)
        self.variables = make_variables(options)
        self.variant = make_variant(options, self.variables)
        self.checks: Sequence[DataCheck] = weather_checks(
            self.variables.locations(), [*options.masked, *self.variant.absent]
        )

    def expect(self, data: DataConfig, new_heads: Mapping[str, NewHead]) -> None:
        """Embeddings of new variables start by an option of their own too."""
        self._new_heads = new_heads

    @classmethod
    def statistics(cls, options: AuroraOptions, sources: Sequence[DataSource], most: int) -> str:
        """`[model.options]` tables with location and scale, from the first training data set.

        Of the variables in tables, which may be empty as in `surf_vars = { tp = {} }`; where there
        are none, of all.
        """
        tables = {"surf_vars": options.surf_vars, "atmos_vars": options.atmos_vars}
        wanted = {name for table in tables.values() if isinstance(table, dict) for name in table}
        known = {key: _with_some_statistics(table) for key, table in tables.items()}
        adapter = cls(dataclasses.replace(options, rollout_steps=1, **known))
        found = compute_statistics(adapter.dataset(sources[0], "train"), most)
        note = "" if wanted else _STATISTICS_OF_ALL
        wanted = wanted or {*adapter.variables.surf, *adapter.variables.atmos}
        return note + format_statistics({n: s for n, s in found.items() if n in wanted})

    @classmethod
    def optim_presets(
        cls, options: AuroraOptions, model: ModelConfig, new_heads: Collection[str]
    ) -> Mapping[str, Mapping[str, Any]]:
        """See `fastft.adapters.aurora.presets`."""
        return optim_presets(options, model, new_heads)

    def build(
        self,
        criterion: Criterion | None,
        *,
        device: torch.device,
        checkpoint: Path | None,
        pretrained: bool,
    ) -> Task:
        """The model under the paper's loss; `[loss]` must have no terms."""
        advice = "remove them, and see model.options.loss"
        refuse_terms(criterion, "the aurora adapter has the paper's loss", advice)
        options, variables = self.options, self.variables
        model = build_model(options, variables)
        self.variant.attach(model)
        loss = AuroraLoss(
            options.loss,
            self.variant,
            clip=model.apply_rollout_input_clipping,
            told_step=told_step(options),
        )
        asked, option = options.hub, "model.options.hub"
        unfetched = unused_weights(option, asked, checkpoint, pretrained=pretrained)
        pretrained = asked and pretrained
        if pretrained:
            load_hub(model, options, variables)
        changed, added = extend(model, options.layer_norms, options.hook)
        wanted = options.kernels == "auto" and by_default(device)
        unused = use_kernels(model, options.residual) if wanted else []
        if options.backbone == "bf16":
            keep_backbone_in_bf16(model)
        changed.to(device)
        self._added, self._place = added, (place := place_of(changed))
        new = [n for n in new_parameters(model, variables) if n.startswith("encoder.")]
        return Task(
            model=changed,
            loss=loss,
            blocks=blocks(model, place),
            heads=[
                *heads(model, variables, place),
                *(n for n, _ in changed.named_parameters() if n in added),
            ],
            carry=AuroraCarry(model, self.variant, longest_carried(options)),
            added=added,
            metrics={"weighted_rmse": WeatherScores(self.variant, timestep_hours(options))},
            low_rank=low_rank(changed),
            pretrained=pretrained,
            notes=[
                *low_rank_notes(options),
                *embedding_notes([f"{place}{n}" for n in new], options, self._new_heads),
                *unfetched,
                *unused,
            ],
        )

    def weights(self, path: Path) -> Mapping[str, Tensor] | None:
        """As the class converts them; None for fastft's own folders, which the core reads."""
        tensors = read_weights(path, self.options)
        if tensors is None:
            return None
        # A user's module may hold aurora's model.
        return {n if n in self._added else f"{self._place}{n}": t for n, t in tensors.items()}

    def dataset(self, source: DataSource, split: Split) -> WeatherData:
        """netCDF files or a Zarr store."""
        return open_weather(
            source,
            split,
            surf_vars=self.variant.reads,
            static_vars=self.variables.static,
            atmos_vars=self.variables.atmos,
            levels=self.options.levels,
            timestep_hours=timestep_hours(self.options),
            rollout_steps=self.options.rollout_steps,
            patch_size=argument(self.options, "patch_size"),
        )

    def transform(self, sample: Sample, split: Split) -> Sample:
        """What the class derives from the files' variables."""
        return self.variant.transform(sample, timestep_hours(self.options))

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """See `fastft.adapters.aurora.batch`."""
        return collate(
            samples,
            self.variant,
            levels=self.options.levels,
            steps=self.options.rollout_steps,
            patch_size=argument(self.options, "patch_size"),
        )

    def prepare(self, task: Task, loader: Loader) -> None:
        """Nothing depends on the data: statistics are the run file's or upstream's."""

    def report(self, options: Mapping[str, Any], sources: Sequence[DataSource]) -> WeatherReport:
        """Scores, tables and maps for `fastft evaluate`."""
        return WeatherReport(
            parse(WeatherReportOptions, options, key="evaluate.options"),
            self.variant,
            self.options.levels,
            timestep_hours(self.options),
            (
                lambda: [self.dataset(source, "train") for source in sources],
                lambda sample: self.transform(sample, "train"),
            ),
        )

    def save(self, task: Task, path: Path) -> None:
        """A file for `load_checkpoint_local`, and `<path>.json` with variables and statistics."""
        save(task.model, self.options, self.variables, path)

    def describe(self, path: Path) -> Description | None:
        """Variables, levels and sizes; None where the file is no checkpoint of Aurora's."""
        return describe(path, self.options)


def _with_some_statistics(table: Any) -> Any:
    """A table in which no variable lacks statistics, so that its data can be opened."""
    if not isinstance(table, dict):
        return table
    return {name: entry or {"location": 0.0, "scale": 1.0} for name, entry in table.items()}
