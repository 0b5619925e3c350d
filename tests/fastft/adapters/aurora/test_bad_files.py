"""Weather data that is refused, and what the message says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weather_files import LAT, LON, TIMES, make_data, opened, problems, write

from fastft.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("lat", "lon", "message"),
    [
        (LAT, np.arange(-8.0, 8.0), "increase within [0, 360) without a hole; got 16 from -8 to 7"),
        (LAT, np.arange(16) * 24.0, "longitudes must differ; got 16 from 0 to 360, with 0 twice"),
        (LAT, np.arange(16) * 1e5, "longitudes must be degrees; got 16 from 0 to 1.5e+06"),
        (LAT * 20, LON, "latitudes must lie in [-90, 90] degrees; got 8 from 160 to 20"),
        (LAT[[0, 2, 1, 3, 4, 5, 6, 7]], LON, "latitudes must increase or decrease throughout"),
    ],
)
def test_grids_that_aurora_cannot_take(
    tmp_path: Path, lat: np.ndarray, lon: np.ndarray, message: str
) -> None:
    path = write(tmp_path, make_data(lat=lat, lon=lon))
    assert [message in p and str(path) in p for p in problems(path)] == [True]


def test_sizes_that_do_not_fit_the_patches(tmp_path: Path) -> None:
    data = make_data(lat=np.arange(11.0, 0, -1), lon=np.arange(18.0))
    path = write(tmp_path, data)
    assert problems(path) == [
        f"{path}: the height must be a multiple of 4, or one more (8, 9, 12), the width a multiple"
        " (16, 20); got 11 x 18; set options.crop = true to cut it to 8 x 16"
    ]
    read = opened(path, {"crop": True})
    assert np.array_equal(read[0]["surf"]["2t"], data["t2m"][:2, 1:9, 1:17])
    assert np.array_equal(read[0]["static"]["z"], data["zs"][1:9, 1:17])
    assert np.array_equal(read.lat, np.arange(10, 2, -1))
    assert "got 11 x 18; read a larger region" in problems(path, {"crop": True}, patch_size=12)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renam": {}}, "era5 (train): options.renam: unknown key; did you mean 'rename'?"),
        ({"stride": 0}, "era5 (train): options.stride: must be"),
        ({"crop": "yes"}, "era5 (train): options.crop: must be true or false"),
        (
            {"rename": {"latitud": "y"}},
            "era5 (train): options.rename: must name a variable of the model or a dimension;"
            " got 'latitud'; did you mean 'latitude'?",
        ),
        ({"start": "May 2020"}, "era5 (train): options.start: must be an ISO time"),
    ],
)
def test_options_that_are_none(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(write(tmp_path, make_data()), options)
    assert [p.startswith(message) for p in caught.value.problems] == [True]


def test_all_variables_that_are_not_there_are_listed(tmp_path: Path) -> None:
    data = make_data().rename(t2m="temp2", zs="oro")
    data["t"] = data["t"].isel(level=0)
    path = write(tmp_path, data)
    assert problems(path, {"rename": {}}) == [
        "era5 (train): surface variable '2t' must be in the files, as '2t', 't2m',"
        " '2m_temperature', over time, latitude, longitude; got lsm, msl, oro, t, temp2, z; name it"
        " in options.rename",
        "era5 (train): atmospheric variable 't' must be in the files, as 't', 'temperature', over"
        " time, level, latitude, longitude; got 't' over (time 12, latitude 8, longitude 16) in"
        " era5.nc; name it in options.rename",
        "era5 (train): static variable 'z' must be in the files, as 'z', 'geopotential',"
        " 'geopotential_at_surface', over latitude, longitude; got 'z' over (time 12, level 2,"
        " latitude 8, longitude 16) in era5.nc; name it in options.rename",
    ]


def test_ensemble_members_must_be_chosen(tmp_path: Path) -> None:
    data = make_data()
    data["t2m"] = data["t2m"].expand_dims(number=2)
    data["msl"] = data["msl"].expand_dims(version=1)
    found = problems(write(tmp_path, data))
    assert len(found) == 1
    assert "got 't2m' over (number 2, time 12, latitude 8, longitude 16)" in found[0]
    one = data.isel(number=slice(1))
    assert np.array_equal(opened(write(tmp_path, one, "b.nc"))[0]["surf"]["2t"], one["t2m"][0, :2])


def test_levels_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, make_data())
    assert problems(path, levels=(500, 700, 1000)) == [
        f"{path}: levels must include 700, 1000 hPa; got 500, 850; set the model's levels, or add"
        " them"
    ]


def test_too_few_times(tmp_path: Path) -> None:
    path = write(tmp_path, make_data())
    held = "got 12 times with all variables from 2020-01-01T00:00 to 2020-01-03T18:00"
    assert [held in p for p in problems(path, timestep_hours=24)] == [True]
    assert "got 0 times with all variables;" in problems(path, {"start": "2021-01-01"})[0]


def test_times_that_occur_twice(tmp_path: Path) -> None:
    data = make_data()
    write(tmp_path, data.isel(time=slice(0, 6)), "days/a.nc")
    write(tmp_path, data.isel(time=slice(5, 12)), "days/b.nc")
    found = problems(tmp_path / "days")
    assert found[0] == (
        "era5 (train): 2t: times must occur once; got 1 twice, first 2020-01-02T06:00 in a.nc and"
        " b.nc; remove one of them"
    )


def test_times_that_are_no_dates(tmp_path: Path) -> None:
    path = write(tmp_path, make_data().assign_coords(time=np.arange(12)))
    assert (
        f"{path}: 'time' must hold dates of the standard calendar; got type int64"
        in (problems(path)[0])
    )


def test_grids_that_differ_between_files(tmp_path: Path) -> None:
    write(tmp_path, make_data(times=TIMES[:6]), "days/a.nc")
    write(tmp_path, make_data(times=TIMES[6:], lon=LON + 1), "days/b.nc")
    days = tmp_path / "days"
    assert problems(days) == [
        f"{days}/b.nc: the grid must be that of {days}/a.nc, 8 x 16 from 8, 20 to 1, 35; got 8 x 16"
        " from 8, 21 to 1, 36; interpolate it, or leave the file out"
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "broken.nc"
    path.write_bytes(b"not netCDF")
    assert problems(path)[0].startswith(f"{path}: must be a readable netCDF file or Zarr store;")
    (tmp_path / "empty").mkdir()
    assert "must hold files that end in .nc" in problems(tmp_path / "empty")[0]
    assert "must hold files that match the path" in problems(tmp_path / "none-*.nc")[0]
    found = problems(write(tmp_path, make_data()), {"static": "none.nc"})
    assert found == ["era5 (train): options.static: must exist; got 'none.nc'; correct the path"]
    # Gone after it was opened.
    read = opened(tmp_path / "era5.nc")
    (tmp_path / "era5.nc").unlink()
    with pytest.raises(DataError, match=r"era5.nc: 2t at 2020-01-01T00:00: must be readable"):
        read[0]
