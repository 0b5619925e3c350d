"""Which weather files hold what: variables, times, levels and grids.

Variables may be spread over files (surface here, pressure levels there, one file per day): each
has its own index from times to files.
"""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from fastft.adapters.aurora.grid import Grid, as_slice, make_grid
from fastft.adapters.aurora.handles import is_zarr, looked_into
from fastft.errors import DataError

# Kind, variable: geopotential is a static variable and an atmospheric one.
Key = tuple[str, str]
KINDS = {"surf": "surface", "atmos": "atmospheric", "static": "static"}
NEEDED = {
    "surf": ("time", "latitude", "longitude"),
    "atmos": ("time", "level", "latitude", "longitude"),
    "static": ("latitude", "longitude"),
}
DIMENSIONS = {
    "time": ("time", "valid_time"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
    "level": ("level", "pressure_level", "isobaricInhPa"),
}
# Aurora's name -> names in ERA5 from the Climate Data Store and in WeatherBench 2.
VARIABLES = {
    "2t": ("t2m", "2m_temperature"),
    "2d": ("d2m", "2m_dewpoint_temperature"),
    "10u": ("u10", "10m_u_component_of_wind"),
    "10v": ("v10", "10m_v_component_of_wind"),
    "100u": ("u100", "100m_u_component_of_wind"),
    "100v": ("v100", "100m_v_component_of_wind"),
    "msl": ("mean_sea_level_pressure",),
    "z": ("geopotential", "geopotential_at_surface"),
    "q": ("specific_humidity",),
    "t": ("temperature",),
    "u": ("u_component_of_wind",),
    "v": ("v_component_of_wind",),
    "lsm": ("land_sea_mask",),
    "slt": ("soil_type",),
}
SUFFIXES = (".nc", ".nc4", ".netcdf", ".zarr")


@dataclass(frozen=True)
class Part:
    """One variable in one file.

    Attributes:
        name: in the file.
        dims: time, level, latitude, longitude -> the file's name, of those it has.
        levels: which to read, of atmospheric variables.
    """

    name: str
    dims: Mapping[str, str]
    levels: slice | np.ndarray | None = None


@dataclass
class Series:
    """Where a variable's times are.

    Attributes:
        parts: by number of the file.
        times: `[T]`, sorted, in seconds since 1970.
        files, rows: of each time.
    """

    parts: dict[int, Part] = field(default_factory=dict)
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    files: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def join(cls, pieces: Sequence[tuple[int, Part, np.ndarray]]) -> "Series":
        """Of files with their times."""
        times = np.concatenate([times for _, _, times in pieces])
        files = np.concatenate([np.full(len(times), number) for number, _, times in pieces])
        rows = np.concatenate([np.arange(len(times)) for _, _, times in pieces])
        order = np.argsort(times, kind="stable")
        parts = {number: part for number, part, _ in pieces}
        return cls(parts, times[order], files[order], rows[order])


def find_files(where: str, path: Path, pattern: str | None, static: Path | None) -> list[Path]:
    """The files of a data set in order of their names; that with the static variables last.

    Raises:
        DataError: there are none.
    """
    if path.is_dir() and not is_zarr(path):
        found = sorted(path.glob(pattern or "*"))
        found = [p for p in found if pattern or p.suffix in SUFFIXES]
        what = f"match '{pattern}'" if pattern else f"end in {', '.join(SUFFIXES)}"
    elif path.exists():
        found, what = [path], ""
    else:
        found, what = [Path(p) for p in sorted(glob.glob(str(path)))], "match the path"  # noqa: PTH207
    problems = []
    if not found:
        problems.append(f"{where}: must hold files that {what}; got none; correct the path")
    if static is not None and not static.exists():
        problems.append(f"{where}: options.static: must exist; got '{static}'; correct the path")
    if problems:
        raise DataError(problems)
    return [p for p in found if p != static] + ([static] if static else [])


def read_part(variable: xr.Variable, part: Part, rows: np.ndarray) -> np.ndarray:
    """The rows' values as `[len(rows), (C,) lat, lon]`; without a time dimension `[lat, lon]`."""
    chosen: dict[str, Any] = {str(d): 0 for d in variable.dims if d not in part.dims.values()}
    if "time" in part.dims:
        chosen[part.dims["time"]] = as_slice(rows)
    if part.levels is not None:
        chosen[part.dims["level"]] = part.levels
    return variable.isel(chosen).transpose(*part.dims.values()).to_numpy()


def iso(seconds: Any) -> str:
    """UTC time as text, to the minute."""
    return str(np.datetime64(int(seconds), "s").astype("datetime64[m]"))


class Scan:
    """Looks into files one after the other, then `finish`.

    Attributes:
        series: of surface and atmospheric variables.
        static: float32 `[H, W]`, by name.
        grids: by number of the file, all leading to the same latitudes and longitudes.

    Args:
        where: data set, for messages.
        keys: the variables to find.
        levels: in hPa.
        rename: Aurora's names and those of dimensions -> the files'.
    """

    def __init__(
        self,
        where: str,
        keys: Sequence[Key],
        levels: Sequence[int],
        rename: Mapping[str, str],
        patch_size: int,
        crop: bool,
    ) -> None:
        self.series: dict[Key, Series] = {}
        self.static: dict[str, np.ndarray] = {}
        self.grids: dict[int, Grid] = {}
        self._where, self._keys, self._levels, self._rename = where, keys, levels, rename
        self._fit = (patch_size, crop)
        self._paths: dict[int, Path] = {}
        self._pieces: dict[Key, list[tuple[int, Part, np.ndarray]]] = {key: [] for key in keys}
        # Times of the file that a static variable was read from: the fewer, the more static.
        self._rank: dict[str, int] = {}
        self._seen: set[Key] = set()
        self._problems: list[str] = []
        # Why files were passed over, told where a variable is not found.
        self._notes: list[str] = []
        self._names: set[str] = set()

    def add(self, number: int, path: Path, alone: Path | None) -> None:
        """Looks into a file; `alone` is the one that static variables are read from, if given."""
        keys = self._keys
        if alone is not None:
            keys = [key for key in keys if (key[0] == "static") == (path == alone)]
        self._paths[number] = path
        try:
            with looked_into(path) as data:
                self._look(number, path, data, keys)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            # What it holds is not known.
            self._seen |= set(keys)
            self._problems.append(
                f"{path}: must be a readable netCDF file or Zarr store; got"
                f" {type(error).__name__}: {error}; repair or remove it"
            )

    def finish(self) -> None:
        """Joins what the files hold.

        Raises:
            DataError: lists all that was found wrong.
        """
        for (kind, name), pieces in self._pieces.items():
            if kind == "static" and name in self.static:
                continue
            if (kind, name) not in self._seen:
                tried = ", ".join(f"'{n}'" for n in self._candidates(kind, name))
                self._problems.append(
                    f"{self._where}: {KINDS[kind]} variable '{name}' must be in the files, as"
                    f" {tried}, over {', '.join(NEEDED[kind])}; got {self._held(kind, name)};"
                    f" name it in options.rename"
                )
                continue
            if not pieces:
                continue
            series = self.series[kind, name] = Series.join(pieces)
            if (twice := np.flatnonzero(np.diff(series.times) == 0)).size:
                first = twice[0]
                a, b = (self._paths[int(series.files[i])].name for i in (first, first + 1))
                self._problems.append(
                    f"{self._where}: {name}: times must occur once; got {twice.size} twice, first"
                    f" {iso(series.times[first])} in {a} and {b}; remove one of them"
                )
        if self._problems:
            raise DataError(dict.fromkeys(self._problems))

    def _look(self, number: int, path: Path, data: xr.Dataset, keys: Sequence[Key]) -> None:
        names = {str(name) for name in data.data_vars}
        self._names |= names
        dims = self._dimensions(data)
        for kind, name in keys:
            there = [n for n in self._candidates(kind, name) if n in names]
            fits = [n for n in there if self._fits(path, data, dims, kind, n)]
            if not fits:
                continue
            self._seen.add((kind, name))
            if not self._take_grid(number, path, data, dims):
                continue
            variable = data.variables[fits[0]]
            levels = self._find_levels(path, data, dims) if kind == "atmos" else None
            has = {d: n for d, n in dims.items() if n in variable.dims}
            part = Part(
                fits[0], {d: has[d] for d in ("time", *NEEDED["atmos"][1:]) if d in has}, levels
            )
            if kind == "static":
                rank = data.sizes[has["time"]] if "time" in has else 0
                if rank < self._rank.get(name, rank + 1):
                    raw = read_part(variable, part, np.arange(1))
                    self._rank[name] = rank
                    self.static[name] = self.grids[number].apply(raw if raw.ndim == 2 else raw[0])
            else:
                times = self._read_times(path, data, dims["time"])
                self._pieces[kind, name].append((number, part, times))

    def _dimensions(self, data: xr.Dataset) -> dict[str, str]:
        found = {}
        for dim, aliases in DIMENSIONS.items():
            names = [self._rename[dim]] if dim in self._rename else aliases
            there = [n for n in names if n in data.sizes and n in data.variables]
            if there:
                found[dim] = there[0]
        return found

    def _candidates(self, kind: str, name: str) -> tuple[str, ...]:
        if kind == "static" and f"static.{name}" in self._rename:
            return (self._rename[f"static.{name}"],)
        if name in self._rename:
            return (self._rename[name],)
        return (name, *VARIABLES.get(name, ()))

    def _fits(
        self, path: Path, data: xr.Dataset, dims: Mapping[str, str], kind: str, name: str
    ) -> bool:
        """Whether a variable has the dimensions of its kind; noted where not."""
        sizes = dict(data[name].sizes)
        has = {d for d, n in dims.items() if n in sizes}
        known = {dims[d] for d in has}
        long = [str(d) for d, size in sizes.items() if d not in known and size > 1]
        good = has >= set(NEEDED[kind]) and not long and ("level" in has) == (kind == "atmos")
        if not good:
            shape = ", ".join(f"{d} {size}" for d, size in sizes.items())
            self._notes.append(f"'{name}' over ({shape}) in {path.name}")
        return good

    def _held(self, kind: str, name: str) -> str:
        """What the files have instead of a variable."""
        candidates = self._candidates(kind, name)
        notes = [n for n in dict.fromkeys(self._notes) if n.split("'")[1] in candidates]
        if notes:
            return "; ".join(notes[:3])
        return ", ".join(sorted(self._names)[:20]) or "no variables"

    def _take_grid(
        self, number: int, path: Path, data: xr.Dataset, dims: Mapping[str, str]
    ) -> bool:
        if number in self.grids:
            return True
        lat, lon = (data[dims[d]].to_numpy() for d in ("latitude", "longitude"))
        grid = make_grid(lat, lon, *self._fit)
        if isinstance(grid, list):
            self._problems.extend(f"{path}: {problem}" for problem in grid)
            return False
        first, other = next(iter(self.grids.items()), (number, grid))
        same = all(
            a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-4)
            for a, b in ((grid.lat, other.lat), (grid.lon, other.lon))
        )
        if not same:
            self._problems.append(
                f"{path}: the grid must be that of {self._paths[first]}, {_extent(other)};"
                f" got {_extent(grid)}; interpolate it, or leave the file out"
            )
            return False
        self.grids[number] = grid
        return True

    def _find_levels(
        self, path: Path, data: xr.Dataset, dims: Mapping[str, str]
    ) -> slice | np.ndarray:
        coordinate = data[dims["level"]]
        factor = 0.01 if coordinate.attrs.get("units") == "Pa" else 1.0
        held = coordinate.to_numpy().astype(np.float64) * factor
        near = np.isclose(held, np.asarray(self._levels, np.float64)[:, None], rtol=0, atol=0.1)
        if absent := [
            level for level, row in zip(self._levels, near, strict=True) if not row.any()
        ]:
            self._problems.append(
                f"{path}: levels must include {', '.join(map(str, absent))} hPa; got"
                f" {', '.join(f'{level:g}' for level in held)}; set the model's levels, or add them"
            )
        return as_slice(near.argmax(axis=1))

    def _read_times(self, path: Path, data: xr.Dataset, dim: str) -> np.ndarray:
        values = data[dim].to_numpy()
        if values.dtype.kind != "M" or np.isnat(values).any():
            got = f"type {values.dtype}" if values.dtype.kind != "M" else "times that are missing"
            self._problems.append(
                f"{path}: '{dim}' must hold dates of the standard calendar; got {got};"
                " write it with units such as 'hours since 1970-01-01'"
            )
            return np.zeros(0, np.int64)
        return values.astype("datetime64[s]").astype(np.int64)


def _extent(grid: Grid) -> str:
    return (
        f"{len(grid.lat)} x {len(grid.lon)} from {grid.lat[0]:g}, {grid.lon[0]:g}"
        f" to {grid.lat[-1]:g}, {grid.lon[-1]:g}"
    )
