"""What the weather usually is, from which anomalies are reckoned."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fastft.adapters.aurora.data import WeatherData
from fastft.adapters.aurora.files import DIMENSIONS, VARIABLES, iso
from fastft.adapters.aurora.handles import open_file
from fastft.errors import DataError
from fastft.task import Batch, Sample

# Beside latitude, longitude and level, a file may have these: WeatherBench 2's have both.
_CLOCK: Mapping[str, Callable[[datetime], int]] = {
    "hour": lambda time: time.hour,
    "dayofyear": lambda time: time.timetuple().tm_yday,
}


class Climatology(Protocol):
    """Usual values of every variable.

    Attributes:
        description: where they come from, in a sentence.
    """

    @property
    def description(self) -> str: ...  # noqa: D102

    def fields(self, name: str, batch: Batch, lead_hours: float) -> Tensor:
        """Of one variable at a lead time of a batch's samples, on the batch's device.

        Returns:
            float64 `[B or 1, C, H, W]`; C is 1 for surface variables.

        Raises:
            DataError: there is none for this variable, grid, level or time.
        """
        ...


class TrainingMean:
    """The mean over training samples: one map per variable and level, for all seasons and hours.

    So what is usual for a season or an hour of the day counts as an anomaly, and raises ACC.

    Args:
        datasets: opens the training data; those with the evaluated grid count.
        transform: makes a sample of theirs one of the model's.
        most: samples to read of all of them together, evenly spaced; each counts with its first
            target.
    """

    def __init__(
        self,
        datasets: Callable[[], Sequence[WeatherData]],
        transform: Callable[[Sample], Sample],
        most: int,
    ) -> None:
        self._open, self._transform, self._most = datasets, transform, most
        self._opened: Sequence[WeatherData] | None = None
        self._means: dict[tuple[bytes, bytes], dict[str, np.ndarray]] = {}
        self.description = "the mean over training samples"

    def fields(self, name: str, batch: Batch, lead_hours: float) -> Tensor:
        """See `Climatology`."""
        lat, lon = batch["lat"], batch["lon"]
        key = (lat.cpu().numpy().tobytes(), lon.cpu().numpy().tobytes())
        if key not in self._means:
            self._means[key] = self._read(lat.cpu().numpy(), lon.cpu().numpy())
        mean = torch.from_numpy(self._means[key][name])
        return mean[None].to(lat.device)

    def _read(self, lat: np.ndarray, lon: np.ndarray) -> dict[str, np.ndarray]:
        if self._opened is None:
            self._opened = self._open()
        # The last row of 721 is cut off in batches.
        fitting = [
            data
            for data in self._opened
            if np.array_equal(data.lat[: len(lat)], lat) and np.array_equal(data.lon, lon)
        ]
        whole = sum(map(len, fitting))
        if not whole:
            raise DataError(
                "evaluate.options.climatology: must be a file where no training data have the grid"
                f" of the evaluated data, {len(lat)} x {len(lon)} from {lat[0]:g}, {lon[0]:g}; got"
                " none; set it to a netCDF file or a Zarr store"
            )
        count = min(self._most, whole)
        places = [(data, i) for data in fitting for i in range(len(data))]
        sums: dict[str, np.ndarray] = {}
        counts: dict[str, np.ndarray] = {}
        times = []
        for number in range(count):
            data, index = places[number * whole // count]
            sample = self._transform(data[index])
            times.append(sample["time"])
            for name, values in {**sample["target_surf"], **sample["target_atmos"]}.items():
                now = np.asarray(values)[0, ..., : len(lat), :].astype(np.float64)
                now = now if name in sample["target_atmos"] else now[None]
                there = np.isfinite(now)
                sums[name] = sums.get(name, 0) + np.where(there, now, 0)
                counts[name] = counts.get(name, 0) + there
        self.description = (
            f"the mean over {count} of {whole} training samples, {iso(min(times))} to"
            f" {iso(max(times))} UTC, one map for all seasons and hours"
        )
        with np.errstate(invalid="ignore"):
            return {name: total / counts[name] for name, total in sums.items()}


class ClimatologyFile:
    """Maps of a netCDF file or a Zarr store, by `hour` and `dayofyear` where it has these.

    Variables and dimensions go by Aurora's names or the usual ones. The evaluated grid must be part
    of the file's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data: xr.Dataset | None = None
        self.description = f"{path}"

    def fields(self, name: str, batch: Batch, lead_hours: float) -> Tensor:
        """See `Climatology`."""
        if self._data is None:
            self._data = self._opened()
        levels = batch["levels"] if batch[name].ndim == 5 else None
        variable, place = self._find(self._data, name, batch, levels)
        held = {str(dim) for dim in variable.dims}
        maps = []
        for seconds in batch["time"]:
            time = datetime.fromtimestamp(seconds, UTC) + timedelta(hours=lead_hours)
            rows = {dim: self._row(dim, read(time)) for dim, read in _CLOCK.items() if dim in held}
            values = variable.isel({**place, **rows}).transpose(*place).to_numpy()
            maps.append(values if levels is not None else values[None])
        return torch.from_numpy(np.stack(maps).astype(np.float64)).to(batch["lat"].device)

    def _opened(self) -> xr.Dataset:
        try:
            return open_file(self._path)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"evaluate.options.climatology: {self._path} must be a readable netCDF file or"
                f" Zarr store; got {type(error).__name__}: {error}; correct the path"
            ) from error

    def _find(
        self, data: xr.Dataset, name: str, batch: Batch, levels: Sequence[int] | None
    ) -> tuple[xr.Variable, dict[str, Any]]:
        """A variable, and which levels, rows and columns to take of it."""
        wanted = ["latitude", "longitude"] if levels is None else ["level", "latitude", "longitude"]
        dims = {d: n for d in wanted for n in DIMENSIONS[d] if n in data.dims}

        def fits(variable: xr.Variable) -> bool:
            others = set(variable.dims) - set(dims.values())
            return set(dims.values()) <= set(variable.dims) and others <= set(_CLOCK)

        names = [n for n in (name, *VARIABLES.get(name, ())) if n in data.data_vars]
        found = [data.variables[n] for n in names if fits(data.variables[n])]
        if not found or len(dims) < len(wanted):
            raise DataError(
                f"{self._path}: must hold '{name}' over {', '.join(wanted)}, and perhaps hour and"
                f" dayofyear; got {', '.join(map(str, data.data_vars)) or 'no variables'}; add it,"
                " or leave evaluate.options.climatology out"
            )
        values = {"latitude": batch["lat"].cpu().numpy(), "longitude": batch["lon"].cpu().numpy()}
        values |= {} if levels is None else {"level": np.asarray(levels, np.float64)}
        return found[0], {dims[d]: self._match(data, d, dims[d], values[d]) for d in wanted}

    def _match(self, data: xr.Dataset, what: str, dim: str, wanted: np.ndarray) -> np.ndarray:
        """Positions of values along a dimension."""
        held = data[dim].to_numpy().astype(np.float64)
        if what == "level" and data[dim].attrs.get("units") == "Pa":
            held = held * 0.01
        apart = np.abs(wanted.astype(np.float64)[:, None] - held)
        if what == "longitude":
            apart = np.minimum(apart % 360, 360 - apart % 360)
        nearest = apart.argmin(axis=1)
        far = np.flatnonzero(apart.min(axis=1) > (0.1 if what == "level" else 1e-3))
        if far.size:
            raise DataError(
                f"{self._path}: {what} must include those of the evaluated data; got none at"
                f" {wanted[far[0]]:g}; interpolate it to their grid"
            )
        return nearest

    def _row(self, dim: str, value: int) -> int:
        assert self._data is not None
        held = self._data[dim].to_numpy() if dim in self._data.coords else np.zeros(0)
        rows = np.flatnonzero(held == value)
        if not rows.size:
            raise DataError(
                f"{self._path}: '{dim}' must include {value}, the valid time of a forecast; got"
                f" {', '.join(f'{v:g}' for v in held[:10]) or 'no coordinate'}; use a climatology"
                " with it"
            )
        return int(rows[0])
