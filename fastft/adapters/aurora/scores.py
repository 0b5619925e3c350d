"""Latitude-weighted scores of weather forecasts, per variable, level and lead time.

For a prediction f, the target o and a climatology c, with the weights w = cos(latitude) of the
rows, divided by their mean over the rows:

    RMSE = sqrt(mean over samples and points of w (f - o)^2)
    ACC  = mean over samples of sum w f' o' / sqrt(sum w f'^2 * sum w o'^2), f' = f - c, o' = o - c

As in WeatherBench 2 (Rasp et al. 2024, arXiv 2308.15560): the root is outside of the mean over
samples, and anomalies are not centred. Its weights are the areas of the cells, which are those here
on a global grid without points at the poles.

Points where the target is not finite do not count, nor those where the prediction has no wave, nor,
for ACC, those where the climatology is not finite.
Angles differ by the shorter way round, and have no ACC.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.adapters.aurora.climatology import Climatology
from fastft.adapters.aurora.variants import Weather
from fastft.task import Batch


@dataclass(frozen=True)
class Score:
    """Of one variable, level and lead time.

    Attributes:
        level: in hPa; None of surface variables.
        rmse: in the variable's unit.
        acc: None without a climatology, and of angles.
    """

    variable: str
    level: int | None
    lead_hours: float
    rmse: float
    acc: float | None

    @property
    def name(self) -> str:
        """As aurora writes it: '2t', 't_500'."""
        return self.variable if self.level is None else f"{self.variable}_{self.level}"


class WeatherScores:
    """RMSE and, with a climatology, ACC; sums are kept in float64 on the device.

    Reports 'weighted_rmse/2t/6h', 'weighted_rmse/t_500/6h', and likewise 'acc/...'.

    Args:
        variant: of the run's class, with its variables.
        timestep_hours: between lead times.
        climatology: see `fastft.adapters.aurora.climatology`.
    """

    def __init__(
        self, variant: Weather, timestep_hours: float, climatology: Climatology | None = None
    ) -> None:
        self._variant = variant
        # Others are filled in, as insolation.
        self._names = tuple(dict.fromkeys(variant.channels.values()))
        self._timestep_hours, self._climatology = timestep_hours, climatology
        self.reset()

    def reset(self) -> None:
        """Forgets all batches."""
        # Variable -> squares, weights, correlations and their number: `[4, R, C]`, C = 1 for
        # surface variables.
        self._sums: dict[str, Tensor] = {}
        self._levels: tuple[int, ...] = ()

    def update(self, predictions: Any, batch: Batch, /) -> None:
        """Adds a batch; predictions and targets are `[B, R, H, W]` or `[B, R, C, H, W]`."""
        self._levels = batch["levels"]
        weights = latitude_weights(batch["lat"])[:, None]
        for name in self._names:
            steps = range(batch[name].shape[1])
            sums = torch.stack([self._step(name, predictions, batch, weights, i) for i in steps], 1)
            self._sums[name] = self._sums.get(name, 0) + sums

    def _step(
        self, name: str, predictions: Any, batch: Batch, weights: Tensor, step: int
    ) -> Tensor:
        """`[4, C]` of one step: those of all at once would not leave the model much memory."""
        prediction, target = (x[name][:, step].double() for x in (predictions, batch))
        if name not in self._variant.variables.levels:
            prediction, target = prediction[:, None], target[:, None]
        there = target.isfinite()
        if name in self._variant.absent:
            there &= prediction.isfinite()
        angle = name in self._variant.angles
        squares = torch.where(there, errors(prediction, target, angle=angle), 0).square()
        sums = [(weights * squares).sum((0, 2, 3)), (weights * there).sum((0, 2, 3))]
        if self._climatology is None or angle:
            return torch.stack([*sums, *[torch.zeros_like(sums[0])] * 2])
        usual = self._climatology.fields(name, batch, self._timestep_hours * (step + 1))
        # A mean over samples has none where no sample had a value.
        known = there & usual.isfinite()
        first, second = (torch.where(known, x - usual, 0) for x in (prediction, target))
        return torch.stack([*sums, *_correlations(first, second, weights)])

    def compute(self) -> Mapping[str, float]:
        """Every score, by name; waits for the device."""
        found = list(self.scores())
        values = {f"weighted_rmse/{s.name}/{s.lead_hours:g}h": s.rmse for s in found}
        correlations = {f"acc/{s.name}/{s.lead_hours:g}h": s.acc for s in found}
        return values | {name: acc for name, acc in correlations.items() if acc is not None}

    def scores(self) -> Iterator[Score]:
        """Yields surface variables, then atmospheric ones by level, lead times in order.

        NaN where there is nothing to score.
        """
        for name, sums in self._sums.items():
            # `[C, R]`
            squares, weight, correlation, count = sums.transpose(1, 2).cpu()
            rmse, acc = (squares / weight).sqrt().tolist(), (correlation / count).tolist()
            correlated = self._climatology is not None and name not in self._variant.angles
            upper = name in self._variant.variables.levels
            for channel, level in enumerate(self._levels if upper else (None,)):
                for step, error in enumerate(rmse[channel]):
                    found = acc[channel][step] if correlated else None
                    yield Score(name, level, self._timestep_hours * (step + 1), error, found)


def latitude_weights(lat: Tensor) -> Tensor:
    """float64 `[H]` of latitudes in degrees, with a mean of 1."""
    weights = lat.double().deg2rad().cos()
    return weights / weights.mean()


def errors(prediction: Tensor, target: Tensor, *, angle: bool) -> Tensor:
    """The difference; of angles in degrees the one within [-180, 180)."""
    difference = prediction - target
    return (difference + 180) % 360 - 180 if angle else difference


def _correlations(first: Tensor, second: Tensor, weights: Tensor) -> list[Tensor]:
    """Sum over samples of the correlations of anomalies, and their number: `[C]`."""

    def product(x: Tensor, y: Tensor) -> Tensor:
        return (weights * x * y).sum((2, 3))

    spread = (product(first, first) * product(second, second)).sqrt()
    varies = spread != 0
    correlation = torch.where(varies, product(first, second) / spread, 0)
    return [correlation.sum(0), varies.sum(0).double()]
