"""What `fastft evaluate` makes of a weather run: a table, scores.csv and scores.json, maps."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from fastft.adapters.aurora.climatology import Climatology, ClimatologyFile, TrainingMean
from fastft.adapters.aurora.data import WeatherData
from fastft.adapters.aurora.maps import UNITS, Map, draw_map
from fastft.adapters.aurora.scores import Score, WeatherScores, errors, latitude_weights
from fastft.adapters.aurora.variants import Weather
from fastft.errors import ConfigError, nearest
from fastft.task import Batch, Sample, TextTable


@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class WeatherReportOptions:
    """`[evaluate.options]` of the aurora adapter."""

    climatology: Annotated[
        Path | None,
        Field(
            description="netCDF file or Zarr store that anomalies are reckoned from; default: the"
            " mean over training samples."
        ),
    ] = None
    climatology_samples: Annotated[
        int, Field(ge=1, description="Training samples to average without a file.")
    ] = 200
    maps: Annotated[
        tuple[str, ...] | None,
        Field(
            description="Variables to draw, as '2t' or 't_500'; default: those of the surface, and"
            " the others at the level nearest to 500 hPa."
        ),
    ] = None


class WeatherReport:
    """Scores with ACC, and maps of the first sample at the first and the last lead time.

    Args:
        options: what to draw, and the climatology.
        variant, levels, timestep_hours: the run's.
        training: opens the training data, and makes a sample of them one of the model's.

    Raises:
        ConfigError: maps of variables that are not predicted.
    """

    def __init__(
        self,
        options: WeatherReportOptions,
        variant: Weather,
        levels: Sequence[int],
        timestep_hours: float,
        training: tuple[Callable[[], Sequence[WeatherData]], Callable[[Sample], Sample]],
    ) -> None:
        self._timestep_hours = timestep_hours
        self._climatology: Climatology = (
            ClimatologyFile(options.climatology)
            if options.climatology
            else TrainingMean(*training, options.climatology_samples)
        )
        self._scores = WeatherScores(variant, timestep_hours, self._climatology)
        self._angles = variant.angles
        self._places = _places(options.maps, variant, levels)
        self._maps: list[Map] = []

    def reset(self) -> None:
        """Forgets all batches."""
        self._scores.reset()
        self._maps = []

    def update(self, predictions: Any, batch: Batch, /) -> None:
        """Adds a batch; keeps maps of the first."""
        self._scores.update(predictions, batch)
        if self._maps:
            return
        steps = batch[next(iter(self._places.values()))[0]].shape[1] if self._places else 0
        for variable, channel, level in self._places.values():
            for step in sorted({0, steps - 1}):
                self._maps.append(self._map(predictions, batch, variable, channel, level, step))

    def compute(self) -> Mapping[str, float]:
        """See `WeatherScores`."""
        return self._scores.compute()

    def table(self) -> TextTable:
        """RMSE and ACC by variable and level, at the first and the last lead time.

        More would be cut off where a terminal is 80 columns wide; the files have all.
        """
        rows: dict[str, dict[float, Score]] = {}
        for score in self._scores.scores():
            rows.setdefault(score.name, {})[score.lead_hours] = score
        every = {lead for row in rows.values() for lead in row}
        leads = sorted({min(every), max(every)})
        columns = ["variable", "unit"]
        columns += [f"{what} {lead:g} h" for lead in leads for what in ("RMSE", "ACC")]
        texts = []
        for name, row in rows.items():
            unit = UNITS.get(next(iter(row.values())).variable, "")
            cells = [name, unit]
            for lead in leads:
                acc = row[lead].acc
                cells += [f"{row[lead].rmse:.4g}", "-" if acc is None else f"{acc:.4f}"]
            texts.append(cells)
        return TextTable(
            f"Latitude-weighted scores; anomalies from {self._climatology.description}",
            columns,
            texts,
        )

    def write(self, folder: Path) -> None:
        """`scores.csv`, `scores.json`, and `maps/<variable>-<lead time>h.png`."""
        rows = [
            {
                "variable": score.variable,
                "level_hpa": score.level,
                "lead_hours": score.lead_hours,
                "unit": UNITS.get(score.variable, ""),
                "rmse": _finite(score.rmse),
                "acc": _finite(score.acc),
            }
            for score in self._scores.scores()
        ]
        record = {"climatology": self._climatology.description, "scores": rows}
        (folder / "scores.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (folder / "maps").mkdir()
        for shown in self._maps:
            level = "" if shown.level is None else f"_{shown.level}"
            name = f"{shown.variable}{level}-{shown.lead_hours:g}h.png"
            draw_map(shown).savefig(folder / "maps" / name, format="png")

    def _map(
        self,
        predictions: Any,
        batch: Batch,
        variable: str,
        channel: int,
        level: int | None,
        step: int,
    ) -> Map:
        pair = [x[variable][0, step] for x in (predictions, batch)]
        prediction, target = (x if level is None else x[channel] for x in pair)
        error = errors(prediction.double(), target, angle=variable in self._angles)
        weights = latitude_weights(batch["lat"])[:, None].expand_as(error)
        there = error.isfinite()
        mean = (weights * error.square())[there].sum() / weights[there].sum()
        hours = self._timestep_hours * (step + 1)
        land = batch["static"].get("lsm")
        return Map(
            variable=variable,
            level=level,
            unit=UNITS.get(variable, ""),
            lead_hours=hours,
            valid=int(batch["time"][0] + hours * 3600),
            target=target.float().cpu().numpy(),
            prediction=prediction.float().cpu().numpy(),
            error=error.float().cpu().numpy(),
            lat=batch["lat"].cpu().numpy(),
            lon=batch["lon"].cpu().numpy(),
            land=None if land is None else land.cpu().numpy(),
            rmse=mean.sqrt().item(),
        )


def _places(
    wanted: Sequence[str] | None, variant: Weather, levels: Sequence[int]
) -> dict[str, tuple[str, int, int | None]]:
    """Name of a map -> variable, channel and level."""
    predicted = dict.fromkeys(variant.channels.values())
    surface = [name for name in predicted if name not in variant.variables.levels]
    upper = [name for name in predicted if name in variant.variables.levels]
    known: dict[str, tuple[str, int, int | None]] = {name: (name, 0, None) for name in surface}
    known |= {
        f"{name}_{level}": (name, channel, level)
        for name in upper
        for channel, level in enumerate(levels)
    }
    if wanted is None:
        middle = min(levels, key=lambda level: abs(level - 500))
        wanted = [*surface, *(f"{name}_{middle}" for name in upper)]
    problems = [
        f"evaluate.options.maps: must name predicted variables, as 't_500'; got '{name}'"
        f"{nearest(name, known)}"
        for name in wanted
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    return {name: known[name] for name in wanted}


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
