"""Weighted RMSE and ACC against float64 by hand and other definitions, climatologies, maps."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from weather_files import LEVELS, TIMES, make_data, opened, seconds, write

from fastft.adapters.aurora.climatology import ClimatologyFile, TrainingMean
from fastft.adapters.aurora.maps import Map, draw_map
from fastft.adapters.aurora.scores import WeatherScores, latitude_weights
from fastft.errors import DataError
from fastft.task import Batch

# Cells of a global grid, none of them at a pole.
LAT = np.arange(85.0, -90.0, -10.0)
LON = np.arange(0.0, 360.0, 30.0)
CLOCK = {"hour": 4, "dayofyear": 366}


def make_batch(adapter: Any, seed: int, size: int = 2) -> tuple[dict[str, Any], Batch]:
    """Predictions and a batch of two lead times; msl near 1e5, where float32 is coarse."""
    random = np.random.default_rng(seed)
    predictions, data = {}, {}
    for name in (*adapter.variables.surf, *adapter.variables.atmos):
        levels = [2] if name in adapter.variables.atmos else []
        shape = (size, 2, *levels, len(LAT), len(LON))
        for side in (predictions, data):
            values = 1e5 + 10 * random.normal(size=shape)
            side[name] = torch.tensor(values, dtype=torch.float32)
    data |= {
        "lat": torch.tensor(LAT, dtype=torch.float32),
        "lon": torch.tensor(LON, dtype=torch.float32),
        "levels": LEVELS,
        "time": tuple(seconds(time) for time in TIMES[seed : seed + size]),
    }
    return predictions, Batch(data, size)


@pytest.fixture
def adapter(make_adapter: Any) -> Any:
    return make_adapter(surf_vars=["2t", "msl"], atmos_vars=["t", "z"])


def test_rmse_is_that_of_float64_by_hand(adapter: Any) -> None:
    scores = WeatherScores(adapter.variant, 6.0)
    batches = [make_batch(adapter, seed, size) for seed, size in ((0, 2), (1, 3))]
    # Missing targets do not count; a grid cell's weight goes with it.
    batches[1][1]["msl"][1, 0, 3:, 2] = math.nan
    for predictions, batch in batches:
        scores.update(predictions, batch)
    values = scores.compute()
    assert len(values) == 2 * (2 + 2 * 2)

    weights = np.cos(np.deg2rad(LAT)) / np.cos(np.deg2rad(LAT)).mean()
    np.testing.assert_allclose(latitude_weights(torch.tensor(LAT)).numpy(), weights, rtol=1e-15)
    for name, place in (("2t", ()), ("msl", ()), ("t_850", (1,)), ("z_500", (0,))):
        for step, lead in ((0, "6h"), (1, "12h")):
            total = share = 0.0
            for predictions, batch in batches:
                variable = name.partition("_")[0]
                pair = (predictions[variable].numpy(), batch[variable].numpy())
                f, o = (x.astype(np.float64)[(slice(None), step, *place)] for x in pair)
                for sample, row, column in np.ndindex(f.shape):
                    if not np.isnan(o[sample, row, column]):
                        difference = f[sample, row, column] - o[sample, row, column]
                        total += weights[row] * difference**2
                        share += weights[row]
            expected = math.sqrt(total / share)
            assert values[f"weighted_rmse/{name}/{lead}"] == pytest.approx(expected, rel=1e-12)

    scores.reset()
    assert scores.compute() == {}


def test_weights_are_areas_on_a_global_grid() -> None:
    """WeatherBench 2: sin of a cell's upper edge less that of its lower, over their mean."""
    edges = np.deg2rad(np.arange(90.0, -91.0, -10.0))
    areas = -np.diff(np.sin(edges))
    ours = latitude_weights(torch.tensor(LAT, dtype=torch.float32))
    np.testing.assert_allclose(ours.numpy(), areas / areas.mean(), rtol=1e-6)


def write_climatology(path: Path) -> xr.Dataset:
    """By hour and day of the year, on a finer grid, from south to north, west of 0 first."""
    lat, lon = np.arange(-85.0, 86.0, 5.0), np.arange(-180.0, 180.0, 15.0)
    random = np.random.default_rng(7)
    shape = [*CLOCK.values(), len(lat), len(lon)]
    dims = [*CLOCK, "latitude", "longitude"]
    values = 1e5 + 5 * random.normal(size=shape).astype(np.float32)
    levels = values[:, :, None] + np.arange(3, dtype=np.float32)[:, None, None]
    clim = xr.Dataset(
        {
            "2m_temperature": (dims, values),
            "temperature": ([*CLOCK, "level", *dims[2:]], levels),
        },
        {
            "hour": [0, 6, 12, 18],
            "dayofyear": np.arange(1, 367),
            "level": [300, 500, 850],
            "latitude": lat,
            "longitude": lon,
        },
    )
    clim.to_netcdf(path)
    return clim


def test_acc_with_a_climatology_file(tmp_path: Path, make_adapter: Any) -> None:
    adapter = make_adapter(surf_vars=["2t"], atmos_vars=["t"])
    clim = write_climatology(tmp_path / "climatology.nc")
    file = ClimatologyFile(tmp_path / "climatology.nc")
    scores = WeatherScores(adapter.variant, 6.0, file)
    batches = [make_batch(adapter, seed) for seed in (0, 3)]
    for predictions, batch in batches:
        scores.update(predictions, batch)
    values = scores.compute()

    weights = np.cos(np.deg2rad(LAT))[:, None]
    for name, level in (("2t", None), ("t", 850)):
        for step, lead in ((0, "6h"), (1, "12h")):
            each = []
            for predictions, batch in batches:
                for sample, second in enumerate(batch["time"]):
                    valid = np.datetime64(second + (step + 1) * 6 * 3600, "s")
                    day = int((valid.astype("M8[D]") - valid.astype("M8[Y]")).astype(int)) + 1
                    hour = int((valid - valid.astype("M8[D]")).astype(int)) // 3600
                    usual = clim["2m_temperature" if level is None else "temperature"]
                    usual = usual.sel(dayofyear=day, hour=hour)
                    usual = usual if level is None else usual.sel(level=level)
                    lon = (LON + 180) % 360 - 180
                    usual = usual.sel(latitude=LAT, longitude=lon).to_numpy().astype(np.float64)
                    place = (sample, step) if level is None else (sample, step, 1)
                    f = predictions[name].numpy().astype(np.float64)[place] - usual
                    o = batch[name].numpy().astype(np.float64)[place] - usual
                    spread = math.sqrt((weights * f**2).sum() * (weights * o**2).sum())
                    each.append((weights * f * o).sum() / spread)
            full = name if level is None else f"{name}_{level}"
            assert values[f"acc/{full}/{lead}"] == pytest.approx(np.mean(each), rel=1e-10)


def test_a_perfect_and_a_reversed_forecast(adapter: Any, tmp_path: Path) -> None:
    class Zero:
        description = "nothing"

        def fields(self, name: str, batch: Batch, lead_hours: Any) -> torch.Tensor:
            return torch.full((1, 1, 1, 1), 1e5, dtype=torch.float64)

    _, batch = make_batch(adapter, 0)
    for sign in (1, -1):
        scores = WeatherScores(adapter.variant, 6.0, Zero())
        names = (*adapter.variables.surf, *adapter.variables.atmos)
        scores.update({n: 1e5 + sign * (batch[n].double() - 1e5) for n in names}, batch)
        for score in scores.scores():
            assert score.acc == pytest.approx(sign, abs=1e-12)
            assert (score.rmse == 0) == (sign == 1)


def test_points_without_a_climatology_do_not_count(adapter: Any) -> None:
    class Partial:
        description = "what is known of the first rows"

        def fields(self, name: str, batch: Batch, lead_hours: float) -> torch.Tensor:
            usual = torch.full((1, 1, len(LAT), 1), 1e5, dtype=torch.float64)
            usual[:, :, 5:] = math.nan
            return usual

    predictions, batch = make_batch(adapter, 0)
    scores = WeatherScores(adapter.variant, 6.0, Partial())
    scores.update(predictions, batch)
    values = scores.compute()
    f, o = (x["2t"][:, 0, :5].double().numpy() - 1e5 for x in (predictions, batch))
    weights = np.cos(np.deg2rad(LAT[:5]))[:, None]
    ff, fo, oo = ((weights * a * b).sum((1, 2)) for a, b in ((f, f), (f, o), (o, o)))
    assert values["acc/2t/6h"] == pytest.approx((fo / np.sqrt(ff * oo)).mean(), rel=1e-6)


def test_angles_and_waves_that_are_not_there(make_adapter: Any) -> None:
    adapter = make_adapter(surf_vars=["2t", "msl"], atmos_vars=["t"])
    variant = adapter.variant
    variant.angles, variant.absent = frozenset({"2t"}), frozenset({"msl"})
    predictions, batch = make_batch(adapter, 0)
    shape = batch["2t"].shape
    predictions |= {"2t": torch.full(shape, 350.0), "msl": torch.ones(shape)}
    targets = {"2t": torch.full(shape, 10.0), "msl": torch.zeros(shape)}
    batch = Batch({**batch.data, **targets}, batch.size)
    predictions["msl"][0, 0, 0, 0] = math.nan
    predictions["t"][0, 0, 0, 0, 0] = math.nan
    scores = WeatherScores(variant, 6.0)
    scores.update(predictions, batch)
    values = scores.compute()
    assert values["weighted_rmse/2t/6h"] == pytest.approx(20, rel=1e-12)
    assert values["weighted_rmse/msl/6h"] == pytest.approx(1, rel=1e-12)
    # Elsewhere a prediction that is NaN is an error.
    assert math.isnan(values["weighted_rmse/t_500/6h"])
    assert math.isfinite(values["weighted_rmse/t_850/6h"])


def test_what_a_climatology_file_lacks(tmp_path: Path, make_adapter: Any) -> None:
    adapter = make_adapter(surf_vars=["2t", "msl"], atmos_vars=["t"])
    path = tmp_path / "climatology.nc"
    clim = write_climatology(path)
    _, batch = make_batch(adapter, 0)

    def problem(data: xr.Dataset, name: str = "t") -> str:
        changed = tmp_path / "changed.nc"
        changed.unlink(missing_ok=True)
        data.to_netcdf(changed)
        with pytest.raises(DataError) as error:
            ClimatologyFile(changed).fields(name, batch, 6.0)
        return error.value.problems[0].removeprefix(f"{changed}: ")

    assert problem(clim, "msl") == (
        "must hold 'msl' over latitude, longitude, and perhaps hour and dayofyear; got"
        " 2m_temperature, temperature; add it, or leave evaluate.options.climatology out"
    )
    assert problem(clim.isel(level=[0, 1])) == (
        "level must include those of the evaluated data; got none at 850; interpolate it to their"
        " grid"
    )
    assert "latitude must include those" in problem(clim.isel(latitude=slice(3, None)))
    assert problem(clim.isel(hour=[0, 2])) == (
        "'hour' must include 6, the valid time of a forecast; got 0, 12; use a climatology with it"
    )
    with pytest.raises(DataError, match=r"absent.nc must be a readable netCDF file or Zarr store"):
        ClimatologyFile(tmp_path / "absent.nc").fields("t", batch, 6.0)


def test_the_mean_over_training_samples(tmp_path: Path, make_adapter: Any) -> None:
    data = make_data()
    data["t2m"][2, :4, 5] = math.nan
    read = opened(write(tmp_path, data))
    usual = TrainingMean(lambda: [read], lambda sample: sample, 200)
    batch = Batch({"lat": torch.tensor(read.lat[:-1]), "lon": torch.tensor(read.lon)}, 1)
    # The first targets of nine samples; the last row is cut off in batches of 721 rows.
    times = slice(2, 11)
    for name, variable in (("2t", "t2m"), ("z", "z")):
        found = usual.fields(name, batch, 6.0).numpy()
        expected = np.nanmean(data[variable].values[times, ..., :-1, :].astype(np.float64), 0)
        np.testing.assert_allclose(np.squeeze(found), expected, rtol=1e-12)
    assert usual.description == (
        "the mean over 9 of 9 training samples, 2020-01-01T06:00 to 2020-01-03T06:00 UTC, one map"
        " for all seasons and hours"
    )
    third = TrainingMean(lambda: [read], lambda sample: sample, 3)
    found = third.fields("2t", batch, 6.0).numpy()[0, 0]
    expected = np.nanmean(data["t2m"].values[[2, 5, 8], :-1].astype(np.float64), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    elsewhere = Batch({"lat": batch["lat"] + 1, "lon": batch["lon"]}, 1)
    with pytest.raises(DataError, match=r"climatology: must be a file where no training data have"):
        usual.fields("2t", elsewhere, 6.0)


def test_a_map_has_one_scale_for_both_fields() -> None:
    random = np.random.default_rng(0)
    target = random.normal(size=(8, 16))
    target[2, 3] = math.nan
    shown = Map(
        variable="z",
        level=500,
        unit="m²/s²",
        lead_hours=24.0,
        valid=seconds(np.datetime64("2025-06-02T06:00")),
        target=target,
        prediction=target + 3,
        error=np.full_like(target, 3.0),
        lat=np.linspace(72, 60, 8),
        lon=np.arange(16.0),
        land=(random.random((8, 16)) > 0.5).astype(float),
        rmse=3.0,
    )
    figure = draw_map(shown)
    assert figure.get_suptitle() == ("z at 500 hPa, m²/s²: 24 h ahead, valid 2025-06-02 06:00 UTC")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    first, second, error = (image.get_clim() for image in images)
    assert first == second
    assert first[0] < np.nanmin(target) + 0.5
    assert first[1] > np.nanmax(target + 3) - 0.5
    assert error[0] == -error[1] == pytest.approx(-3.0)
    titles = [axes.get_title("left") for axes in figure.axes if axes.images]
    assert titles == ["target", "prediction", "prediction − target, RMSE 3"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"longitude, °", "m²/s²"}

    directions = dataclasses.replace(shown, variable="mwd", level=None, unit="°")
    image = next(axes.images[0] for axes in draw_map(directions).axes if axes.images)
    # 359 and 1 degree look alike.
    assert image.get_clim() == (0, 360)
    assert image.to_rgba(np.array([0.0])) == pytest.approx(
        image.to_rgba(np.array([360.0])), abs=0.1
    )
