"""Upstream's own batches and models, for tests that compare with them, and files to train on."""

import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aurora
import numpy as np
import torch
import xarray as xr


def upstream_batch(samples: list[Any]) -> aurora.Batch:
    """The samples as aurora's own batch."""

    def stack(kind: str) -> dict[str, torch.Tensor]:
        names = samples[0][kind]
        return {n: torch.stack([torch.tensor(s[kind][n]) for s in samples]) for n in names}

    first = samples[0]
    return aurora.Batch(
        surf_vars=stack("surf"),
        static_vars={name: torch.tensor(field) for name, field in first["static"].items()},
        atmos_vars=stack("atmos"),
        metadata=aurora.Metadata(
            lat=torch.tensor(first["lat"]),
            lon=torch.tensor(first["lon"]),
            time=tuple(datetime.fromtimestamp(int(s["time"]), UTC) for s in samples),
            atmos_levels=tuple(first["levels"]),
        ),
    )


def upstream_model(record: dict[str, Any]) -> aurora.Aurora:
    """The model of the file beside an exported checkpoint, with nothing of fastft's in it."""
    names = ("surf_vars", "static_vars", "atmos_vars")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The normalisation statics")
        return getattr(aurora, record["model_class"])(
            **{name: tuple(record[name]) for name in names},
            surf_stats={name: tuple(pair) for name, pair in record["surf_stats"].items()},
            stabilise_level_agg=record["stabilise_level_agg"],
            timestep=timedelta(hours=record["timestep_hours"]),
            **{name: tuples(value) for name, value in record["arguments"].items()},
        )


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def write_weather(path: Path, variables: Any, first: int, times: int) -> None:
    """ERA5-like netCDF on 17 rows: one deviation above the statistics, with noise."""
    random = np.random.default_rng(first)
    height, width, levels = 17, 32, (500, 850)
    axes = ["time", "level", "latitude", "longitude"]
    data = {}
    for name in variables.surf:
        location, scale = variables.statistics[name]
        noise = 1 + random.normal(size=(times, height, width))
        data[name] = (axes[:1] + axes[2:], (location + scale * noise).astype(np.float32))
    for name in variables.atmos:
        pairs = np.array([variables.levels[name][str(level)] for level in levels])
        location, scale = pairs.T[:, :, None, None]
        noise = 1 + random.normal(size=(times, 2, height, width))
        data[name] = (axes, (location + scale * noise).astype(np.float32))
    start = np.datetime64("2020-01-01", "ns")
    coordinates = {
        "time": start + (first + np.arange(times)) * np.timedelta64(6, "h"),
        "level": list(levels),
        "latitude": np.linspace(80, -80, height),
        "longitude": np.arange(width) * 360 / width,
    }
    xr.Dataset(data, coordinates).to_netcdf(path)
    shared = np.random.default_rng(99)
    static = {n: (axes[2:], shared.random((height, width))) for n in variables.static}
    del coordinates["time"], coordinates["level"]
    xr.Dataset(static, coordinates).to_netcdf("static.nc")
