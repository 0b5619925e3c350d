"""ERA5-like weather data, netCDF files or a Zarr store, as samples for Aurora.

Files are looked into once, when a data set is opened (`files`), and closed again; values are read
sample by sample, through handles that each process opens for itself.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xarray as xr
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from fastft.adapters.aurora.files import (
    DIMENSIONS,
    Key,
    Scan,
    Series,
    find_files,
    iso,
    read_part,
)
from fastft.adapters.aurora.grid import Grid
from fastft.adapters.aurora.handles import open_file
from fastft.config import DataSource
from fastft.errors import ConfigError, DataError, nearest
from fastft.runfile import parse
from fastft.task import Sample, Split

# Files that each process keeps open.
OPEN_FILES = 64
# Times between the first and the last that are worth listing to count gaps.
MOST_TIMES = 10_000_000


@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class WeatherOptions:
    """`options` of a data set that Aurora reads."""

    rename: Annotated[
        dict[str, str],
        Field(
            description="Aurora's name, or time, latitude, longitude, level -> name in the files;"
            " 'static.z' for a static variable alone."
        ),
    ] = Field(default_factory=dict)
    static: Annotated[
        Path | None, Field(description="File with the static variables; default: among the others.")
    ] = None
    files: Annotated[
        str | None, Field(description="Of a folder: pattern of its files; default: all.")
    ] = None
    start: Annotated[
        str | None, Field(description="ISO time; samples begin at it or later, with all steps.")
    ] = None
    end: Annotated[
        str | None, Field(description="ISO time; samples, with their targets, end before it.")
    ] = None
    stride: Annotated[int, Field(ge=1, description="Keep every n-th time as a sample.")] = 1
    crop: Annotated[
        bool, Field(description="Cut rows and columns off both sides until the patches fit.")
    ] = False


@dataclass(frozen=True)
class Origin:
    """What the files held, before it was brought into Aurora's form; for messages.

    Attributes:
        times: times between the first and the last, at the usual spacing, present or not.
        missing: those that at least one variable lacks.
        first_gap: the first of them.
        left_out: samples that cannot be made for want of a history step or a target.
        latitudes, longitudes: first and last, as found.
        flipped: whether latitudes increased.
        rolled: whether the columns were reordered, so that longitudes increase within [0, 360).
    """

    times: int
    missing: int
    first_gap: str
    left_out: int
    latitudes: tuple[float, float]
    longitudes: tuple[float, float]
    flipped: bool
    rolled: bool


class WeatherData:
    """Samples of two history steps and the targets after them; see `open_weather`.

    Attributes:
        origin: what the files held.
        times: of each sample, the last history step in seconds since 1970.
        lat, lon: the grid, `[H]` and `[W]`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        grids: Mapping[int, Grid],
        series: Mapping[Key, Series],
        static: Mapping[str, np.ndarray],
        levels: Sequence[int],
        steps: np.ndarray,
        times: np.ndarray,
        origin: Origin,
    ) -> None:
        self.origin, self.times = origin, times
        grid = next(iter(grids.values()))
        self.lat, self.lon = grid.lat, grid.lon
        self._paths, self._grids, self._series = paths, grids, series
        self._static, self._levels, self._steps = static, list(levels), steps
        self._process, self._opened = 0, dict[int, xr.Dataset]()

    @property
    def following(self) -> np.ndarray:
        """Index of the sample one step after each, -1 where there is none."""
        wanted = self.times + (self._steps[1] - self._steps[0])
        places = np.searchsorted(self.times, wanted)
        found = np.append(self.times, -1)[places] == wanted
        return np.where(found, places, -1)

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, index: int, /) -> Sample:
        times = self.times[index] + self._steps
        sample: dict[str, Any] = {k: {} for k in ("surf", "atmos", "target_surf", "target_atmos")}
        for (kind, name), series in self._series.items():
            values = self._read(name, series, times)
            sample[kind][name], sample[f"target_{kind}"][name] = values[:2], values[2:]
        return sample | {
            # Copies, for transforms that work in place.
            "static": {name: values.copy() for name, values in self._static.items()},
            "time": np.int64(self.times[index]),
            "lat": self.lat.copy(),
            "lon": self.lon.copy(),
            "levels": list(self._levels),
            "origin": self.origin,
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": 0, "_opened": {}}

    def _read(self, name: str, series: Series, times: np.ndarray) -> np.ndarray:
        """float32 `[len(times), (C,) H, W]`; neighbouring times of one file at once."""
        places = np.searchsorted(series.times, times)
        files, rows = series.files[places], series.rows[places]
        pieces = []
        for group in np.split(np.arange(len(times)), np.flatnonzero(np.diff(files)) + 1):
            number = int(files[group[0]])
            try:
                variable = self._open(number).variables[series.parts[number].name]
                raw = read_part(variable, series.parts[number], rows[group])
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                raise DataError(
                    f"{self._paths[number]}: {name} at {iso(times[group[0]])}: must be readable;"
                    f" got {type(error).__name__}: {error}; repair or replace the file"
                ) from error
            pieces.append(self._grids[number].apply(raw))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _open(self, number: int) -> xr.Dataset:
        # A handle that a forked worker shares with its parent reads garbage.
        if self._process != os.getpid():
            self._process, self._opened = os.getpid(), {}
        if number not in self._opened:
            if len(self._opened) >= OPEN_FILES:
                # Closed where nobody else has it.
                self._opened.pop(next(iter(self._opened)))
            self._opened[number] = open_file(self._paths[number])
        return self._opened[number]


def open_weather(
    source: DataSource,
    split: Split,
    *,
    surf_vars: Sequence[str],
    static_vars: Sequence[str],
    atmos_vars: Sequence[str],
    levels: Sequence[int],
    timestep_hours: float,
    rollout_steps: int,
    patch_size: int = 4,
) -> WeatherData:
    """Opens a netCDF file, a folder or a glob of them, or a Zarr store.

    A sample holds `surf` {name: `[2, H, W]`} and `atmos` {name: `[2, C, H, W]`} at the last two
    steps, `target_surf` and `target_atmos` at the next `rollout_steps` (`[R, ...]`), `static`
    {name: `[H, W]`}, all float32 in the files' units; `time` of the last history step (int64,
    seconds since 1970); `lat` (`[H]`, decreasing), `lon` (`[W]`, increasing in [0, 360)), `levels`
    in the order given; and `origin`, which the data checks read.

    Args:
        source: `source.options` are `WeatherOptions`.
        split: named in messages.
        levels: in hPa.
        patch_size: the height must be a multiple of it, or one more, the width a multiple.

    Raises:
        ConfigError: unknown or wrong options.
        DataError: lists all that does not fit, by file and variable.
    """
    where = f"{source.name or source.path} ({split})"
    options = parse(WeatherOptions, source.options, where=where, key="options")
    wanted = [("surf", v) for v in surf_vars] + [("atmos", v) for v in atmos_vars]
    static = [("static", v) for v in static_vars]
    window = _check_options(where, options, [*wanted, *static])
    if not wanted:
        raise DataError(f"{where}: must have variables to predict; got none; set surf_vars")
    paths = find_files(where, source.path, options.files, options.static)
    scan = Scan(where, [*wanted, *static], levels, options.rename, patch_size, options.crop)
    for number, path in enumerate(paths):
        scan.add(number, path, alone=options.static)
    scan.finish()

    # Rounded: 4.1 hours are 14759.999999999998 seconds.
    steps = np.rint(np.arange(-1, rollout_steps + 1) * timestep_hours * 3600).astype(np.int64)
    present = scan.series[wanted[0]].times
    for key in wanted:
        present = np.intersect1d(present, scan.series[key].times)
    every = np.unique(np.concatenate([scan.series[key].times for key in wanted]))
    present, every = (t[(t >= window[0]) & (t < window[1])] for t in (present, every))
    times, missing, left_out = _choose_times(present, every, steps, options.stride)
    if not times.size:
        held = f"{len(present)} times with all variables"
        if len(present):
            held += f" from {iso(present[0])} to {iso(present[-1])}"
        raise DataError(
            f"{where}: must hold {len(steps)} times {timestep_hours:g} hours apart; got {held};"
            " check the time step, `start` and `end`, and which times each file has"
        )
    grid = next(iter(scan.grids.values()))
    origin = Origin(
        times=len(missing) + len(present),
        missing=len(missing),
        first_gap=iso(missing[0]) if missing.size else "",
        left_out=left_out,
        latitudes=grid.found_lat,
        longitudes=grid.found_lon,
        flipped=grid.flipped,
        rolled=grid.rolled,
    )
    series = {key: scan.series[key] for key in wanted}
    fields = {name: scan.static[name] for name in static_vars}
    return WeatherData(paths, scan.grids, series, fields, levels, steps, times, origin)


def _check_options(where: str, options: WeatherOptions, keys: Sequence[Key]) -> tuple[float, float]:
    """`start` and `end` in seconds since 1970.

    Raises:
        ConfigError: a name in `rename` is nobody's, or a time cannot be read.
    """
    names = {name for _, name in keys} | {
        f"static.{name}" for kind, name in keys if kind == "static"
    }
    known = sorted(names | set(DIMENSIONS))
    problems = [
        f"{where}: options.rename: must name a variable of the model or a dimension; got '{name}'"
        f"{nearest(name, known)}"
        for name in options.rename
        if name not in known
    ]
    window = [-np.inf, np.inf]
    for i, name in enumerate(("start", "end")):
        if (text := getattr(options, name)) is not None:
            try:
                moment = datetime.fromisoformat(text)
                moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
                window[i] = moment.timestamp()
            except ValueError:
                problems.append(
                    f"{where}: options.{name}: must be an ISO time, as 2020-01-31T06:00;"
                    f" got '{text}'; correct it"
                )
    if problems:
        raise ConfigError(problems)
    return window[0], window[1]


def _choose_times(
    present: np.ndarray, every: np.ndarray, steps: np.ndarray, stride: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The samples' times, the times that are missing, and how many samples that costs.

    Args:
        present: times that all variables have, sorted.
        every: times that some variable has.
        steps: of a sample, in seconds, from its own time.
    """
    if len(every) < 2:
        return np.zeros(0, np.int64), np.setdiff1d(every, present), 0
    spacings, counts = np.unique(np.diff(every), return_counts=True)
    spacing = int(spacings[counts.argmax()])
    expected = every
    if (every[-1] - every[0]) / spacing < MOST_TIMES:
        expected = np.union1d(every, np.arange(every[0], every[-1] + 1, spacing))
    due = expected[(expected + steps[0] >= every[0]) & (expected + steps[-1] <= every[-1])]
    # By time rather than by number, so that a gap does not shift the hours of the day.
    due = due[(due - every[0]) // spacing % stride == 0]
    whole = np.isin(due[:, None] + steps, present).all(axis=1)
    return due[whole], np.setdiff1d(expected, present), int((~whole).sum())
