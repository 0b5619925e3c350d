"""Location and scale of weather variables, computed from data."""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastft.errors import DataError
from fastft.task import Dataset

# Surface variable -> {"location", "scale"}; atmospheric -> level in hPa -> the same.
Statistics = dict[str, dict[str, Any]]


class Moments:
    """Mean and squared deviations per channel in float64, merged array by array.

    The merge is exact for any offset (Chan, Golub & LeVeque 1983, eq. 2.1). Values that are not
    finite do not count.

    Attributes:
        count, mean, low, high: of finite values, `[C]`.
    """

    def __init__(self, channels: int) -> None:
        self.count, self.mean = np.zeros(channels), np.zeros(channels)
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self._squares = np.zeros(channels)

    def add(self, values: np.ndarray) -> None:
        """Adds `[C, ...]`."""
        for channel, array in enumerate(values):
            array = array[np.isfinite(array)].astype(np.float64)
            if not array.size:
                continue
            mean = array.mean()
            total = self.count[channel] + array.size
            delta, share = mean - self.mean[channel], array.size / total
            self._squares[channel] += ((array - mean) ** 2).sum()
            self._squares[channel] += delta**2 * self.count[channel] * share
            self.mean[channel] += delta * share
            self.count[channel] = total
            self.low[channel] = min(self.low[channel], array.min())
            self.high[channel] = max(self.high[channel], array.max())

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation, `[C]`; 0 without values."""
        return np.sqrt(self._squares / np.maximum(self.count, 1))


def compute_statistics(dataset: Dataset, max_samples: int | None = None) -> Statistics:
    """Mean and standard deviation of every variable, and level, at the samples' own times.

    One pass over at most `max_samples` samples, evenly spaced. Each sample counts with its last
    history step, so that no time counts twice; grid cells count alike, wherever they lie. Values
    that are not finite do not count.

    Raises:
        DataError: lists variables that hold no values, or a single one, which has no scale.
    """
    read = min(max_samples or len(dataset), len(dataset))
    surf: dict[str, Moments] = {}
    atmos: dict[str, Moments] = {}
    levels: list[int] = []
    for number in range(read):
        sample = dataset[number * len(dataset) // read]
        levels = list(sample["levels"])
        for name, values in sample["surf"].items():
            surf.setdefault(name, Moments(1)).add(np.asarray(values)[-1:])
        for name, values in sample["atmos"].items():
            atmos.setdefault(name, Moments(len(levels))).add(np.asarray(values)[-1])
    problems = [
        f"{name}{f' at {levels[c]} hPa' if name in atmos else ''}: must vary to have a scale; got"
        f" {f'{m.mean[c]:g} throughout' if m.count[c] else 'no finite value'} in {read} samples;"
        " check the file, or leave the variable out"
        for name, m in (surf | atmos).items()
        for c in np.flatnonzero(m.low >= m.high)
    ]
    if problems:
        raise DataError(problems)
    return {name: _entry(m, 0) for name, m in surf.items()} | {
        name: {str(level): _entry(m, c) for c, level in enumerate(levels)}
        for name, m in atmos.items()
    }


def format_statistics(statistics: Statistics) -> str:
    """The part of a run file that gives a model these statistics, as TOML.

    Tables add to the class's variables; each number reads back as it was.
    """
    surf = {name: entry for name, entry in statistics.items() if "scale" in entry}
    lines = []
    if surf:
        lines += ["[model.options.surf_vars]", *(_line(n, e) for n, e in surf.items()), ""]
    for name, levels in statistics.items():
        if name not in surf:
            lines.append(f"[model.options.atmos_vars.{_key(name)}]")
            lines += [*(_line(level, entry) for level, entry in levels.items()), ""]
    return "\n".join(lines)


def _entry(moments: Moments, channel: int) -> dict[str, float]:
    return {"location": float(moments.mean[channel]), "scale": float(moments.std[channel])}


def _line(name: str, entry: Mapping[str, float]) -> str:
    return f"{_key(name)} = {{ location = {entry['location']!r}, scale = {entry['scale']!r} }}"


def _key(name: str) -> str:
    # Levels are quoted, for readers who take them for numbers.
    return name if re.fullmatch("[A-Za-z0-9_-]*[A-Za-z][A-Za-z0-9_-]*", name) else json.dumps(name)
