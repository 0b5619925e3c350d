"""Small weather files, written anew by each test that reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from fastft.adapters.aurora.data import WeatherData, open_weather
from fastft.config import DataSource
from fastft.errors import DataError

LEVELS = (500, 850)
LAT = np.arange(8.0, 0.0, -1.0)
LON = np.arange(20.0, 36.0)
TIMES = np.datetime64("2020-01-01", "ns") + np.arange(12) * np.timedelta64(6, "h")


def make_data(
    lat: np.ndarray = LAT,
    lon: np.ndarray = LON,
    times: np.ndarray = TIMES,
    names: Mapping[str, str] | None = None,
) -> xr.Dataset:
    """Random t2m, msl, t, z (on levels) and static lsm, zs; `names`: of the dimensions."""
    dims = {"time": "time", "level": "level", "latitude": "latitude", "longitude": "longitude"}
    dims |= names or {}
    random = np.random.default_rng(0)
    shape = {"time": len(times), "level": len(LEVELS), "latitude": len(lat), "longitude": len(lon)}

    def field(*axes: str) -> tuple[list[str], np.ndarray]:
        values = random.normal(size=[shape[a] for a in axes]).astype(np.float32)
        return [dims[a] for a in axes], values

    surface = ("time", "latitude", "longitude")
    levels = ("time", "level", "latitude", "longitude")
    return xr.Dataset(
        {
            "t2m": field(*surface),
            "msl": field(*surface),
            "t": field(*levels),
            "z": field(*levels),
            "lsm": field("latitude", "longitude"),
            "zs": field("latitude", "longitude"),
        },
        {
            dims["time"]: times,
            dims["level"]: list(LEVELS),
            dims["latitude"]: lat,
            dims["longitude"]: lon,
        },
    )


def write(folder: Path, data: xr.Dataset, name: str = "era5.nc") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zarr":
        # One time per chunk.
        chunks = {
            str(n): {"chunks": tuple(1 if d == "time" else k for d, k in v.sizes.items())}
            for n, v in data.data_vars.items()
        }
        data.to_zarr(path, encoding=chunks, consolidated=False)
    else:
        data.to_netcdf(path)
    return path


MODEL: dict[str, Any] = {
    "surf_vars": ("2t", "msl"),
    "static_vars": ("lsm", "z"),
    "atmos_vars": ("t", "z"),
    "levels": LEVELS,
    "timestep_hours": 6,
    "rollout_steps": 2,
}


def opened(path: Path, options: dict[str, Any] | None = None, **model: Any) -> WeatherData:
    options = {"rename": {"static.z": "zs"}} | (options or {})
    source = DataSource(path=path, name="era5", options=options)
    return open_weather(source, "train", **(MODEL | model))


def problems(path: Path, options: dict[str, Any] | None = None, **model: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        opened(path, options, **model)
    return list(caught.value.problems)


def seconds(time: Any) -> int:
    return int(time.astype("datetime64[s]").astype(np.int64))


def same(a: Any, b: Any) -> bool:
    """Equal values, wherever they were read from."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "origin")
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))
