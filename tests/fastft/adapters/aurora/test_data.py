"""Weather files as samples: names, grids, gaps, laziness and worker processes."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr.storage
from torch.utils.data import DataLoader
from weather_files import LAT, LON, TIMES, make_data, opened, same, seconds, write

from fastft.adapters.aurora import data as weather_data
from fastft.adapters.aurora import handles
from fastft.adapters.aurora.checks import aurora_locations, weather_checks
from fastft.adapters.aurora.stats import compute_statistics
from fastft.task import CheckData


@pytest.mark.parametrize("name", ["era5.nc", "era5.zarr"])
def test_a_sample_holds_what_the_files_hold(tmp_path: Path, name: str) -> None:
    data = make_data()
    read = opened(write(tmp_path, data, name))
    # Of 12 times the first has no history, the last two no targets.
    assert len(read) == 9
    sample = read[3]
    assert np.array_equal(sample["surf"]["2t"], data["t2m"][3:5])
    assert np.array_equal(sample["target_surf"]["msl"], data["msl"][5:7])
    assert np.array_equal(sample["atmos"]["z"], data["z"][3:5])
    assert np.array_equal(sample["target_atmos"]["t"], data["t"][5:7])
    assert np.array_equal(sample["static"]["z"], data["zs"])
    assert sample["time"] == seconds(TIMES[4])
    assert sample["time"].dtype == np.int64
    assert np.array_equal(sample["lat"], LAT)
    assert np.array_equal(sample["lon"], LON)
    assert sample["levels"] == [500, 850]
    arrays = [v for kind in sample.values() if isinstance(kind, dict) for v in kind.values()]
    assert {a.dtype for a in [*arrays, sample["lat"], sample["lon"]]} == {np.dtype(np.float32)}
    assert [a.shape for a in sample["target_atmos"].values()] == [(2, 2, 8, 16)] * 2


@pytest.mark.parametrize(
    ("dimension", "alias"),
    [
        ("time", "valid_time"),
        ("latitude", "lat"),
        ("longitude", "lon"),
        ("level", "pressure_level"),
        ("level", "isobaricInhPa"),
    ],
)
def test_dimensions_under_other_names(tmp_path: Path, dimension: str, alias: str) -> None:
    plain = opened(write(tmp_path, make_data()))[0]
    known = write(tmp_path, make_data(names={dimension: alias}), "known.nc")
    assert same(opened(known)[0], plain)
    own = write(tmp_path, make_data(names={dimension: "mine"}), "own.nc")
    assert same(opened(own, {"rename": {dimension: "mine", "static.z": "zs"}})[0], plain)


SURFACE = [
    *[("2t", n) for n in ("2t", "t2m", "2m_temperature")],
    *[("10u", n) for n in ("10u", "u10", "10m_u_component_of_wind")],
    *[("10v", n) for n in ("10v", "v10", "10m_v_component_of_wind")],
    *[("msl", n) for n in ("msl", "mean_sea_level_pressure")],
]
ATMOSPHERE = [("z", "geopotential"), ("q", "q"), ("t", "temperature"), ("u", "u"), ("v", "v")]
STATIC = [("lsm", "land_sea_mask"), ("slt", "slt"), ("z", "geopotential_at_surface")]


@pytest.mark.parametrize(
    ("kind", "name", "alias"),
    [
        *[("surf", *pair) for pair in SURFACE],
        *[("atmos", *pair) for pair in ATMOSPHERE],
        *[("static", *pair) for pair in STATIC],
    ],
)
def test_variables_under_other_names(tmp_path: Path, kind: str, name: str, alias: str) -> None:
    held = {"surf": "t2m", "atmos": "t", "static": "lsm"}
    model = {"surf_vars": ("2t",), "atmos_vars": ("t",), "static_vars": ("lsm",)}
    data = make_data()
    path = write(tmp_path, data[[*held.values()]].rename({held[kind]: alias}))
    read = opened(path, {"rename": {}}, **(model | {f"{kind}_vars": (name,)}))
    field = data[held[kind]]
    assert np.array_equal(read[0][kind][name], field if kind == "static" else field[:2])


def test_rename_names_any_variable(tmp_path: Path) -> None:
    data = make_data()
    path = write(tmp_path, data.rename(t2m="VAR_2T", t="TEMP"))
    read = opened(path, {"rename": {"2t": "VAR_2T", "t": "TEMP", "static.z": "zs"}})
    assert np.array_equal(read[0]["surf"]["2t"], data["t2m"][:2])
    assert np.array_equal(read[0]["atmos"]["t"], data["t"][:2])


def test_levels_come_in_the_order_asked_for(tmp_path: Path) -> None:
    data = make_data()
    path = write(tmp_path, data)
    assert np.array_equal(opened(path, levels=(850, 500))[0]["atmos"]["t"], data["t"][:2, ::-1])
    assert np.array_equal(opened(path, levels=(850,))[0]["atmos"]["t"], data["t"][:2, 1:])
    pascal = data.assign_coords(level=("level", [50000.0, 85000.0], {"units": "Pa"}))
    assert same(opened(write(tmp_path, pascal, "pascal.nc"))[0], opened(path)[0])


@pytest.mark.parametrize("dims", [("longitude", "time", "level", "latitude")])
def test_any_order_of_dimensions(tmp_path: Path, dims: tuple[str, ...]) -> None:
    data = make_data()
    turned = data.transpose(*dims)
    assert same(opened(write(tmp_path, turned, "b.nc"))[0], opened(write(tmp_path, data))[0])


def test_increasing_latitudes_are_flipped(tmp_path: Path) -> None:
    data = make_data()
    read = opened(write(tmp_path, data.isel(latitude=slice(None, None, -1))))
    assert same(read[0], opened(write(tmp_path, data, "plain.nc"))[0])
    assert (read.origin.flipped, read.origin.latitudes) == (True, (1.0, 8.0))


@pytest.mark.parametrize("first", [-180.0, -90.0])
def test_global_longitudes_are_rolled(tmp_path: Path, first: float) -> None:
    lon = first + np.arange(16) * 22.5
    data = make_data(lon=lon)
    read = opened(write(tmp_path, data))
    shift = int((lon < 0).sum())
    assert np.array_equal(read.lon, np.arange(16, dtype=np.float32) * 22.5)
    assert np.array_equal(read[0]["atmos"]["z"], np.roll(data["z"][:2], -shift, axis=-1))
    assert np.array_equal(read[0]["static"]["z"], np.roll(data["zs"], -shift, axis=-1))
    assert (read.origin.rolled, read.origin.longitudes[0]) == (True, first)


def test_a_western_region_keeps_its_order(tmp_path: Path) -> None:
    data = make_data(lon=np.arange(-40.0, -24.0))
    read = opened(write(tmp_path, data))
    assert np.array_equal(read.lon, np.arange(320, 336, dtype=np.float32))
    assert np.array_equal(read[0]["surf"]["msl"], data["msl"][:2])
    assert not read.origin.rolled


def test_one_row_more_than_the_patches_is_kept(tmp_path: Path) -> None:
    data = make_data(lat=np.linspace(90, -90, 9))
    assert np.array_equal(opened(write(tmp_path, data))[0]["surf"]["2t"], data["t2m"][:2])


def test_a_folder_and_a_glob_are_joined_by_time(tmp_path: Path) -> None:
    data = make_data()
    whole = opened(write(tmp_path, data))
    # Names against the order of time; surface, levels and static fields apart.
    for name, part in (("b", slice(0, 5)), ("a", slice(5, 12))):
        write(tmp_path, data[["t2m", "msl"]].isel(time=part), f"days/{name}-surface.nc")
        write(tmp_path, data[["t", "z"]].isel(time=part), f"days/{name}-levels.nc")
    write(tmp_path, data[["lsm", "zs"]], "days/static.nc")
    folder = opened(tmp_path / "days")
    assert len(folder) == 9
    assert all(same(folder[i], whole[i]) for i in range(9))
    globbed = opened(tmp_path / "days" / "?-*.nc", {"static": str(tmp_path / "days/static.nc")})
    assert all(same(globbed[i], whole[i]) for i in range(9))
    some = opened(tmp_path / "days", {"files": "[bs]*.nc"})
    assert len(some) == 2


def test_static_fields_of_a_file_of_their_own(tmp_path: Path) -> None:
    data = make_data()
    # With a time, as the Climate Data Store writes them, and rows upside down.
    static = data[["lsm", "zs"]].isel(latitude=slice(None, None, -1)).rename(zs="z")
    other = write(tmp_path, static.expand_dims(valid_time=TIMES[:1]), "other.nc")
    read = opened(write(tmp_path, data), {"static": str(other), "rename": {}})
    assert np.array_equal(read[0]["static"]["z"], data["zs"])
    assert np.array_equal(read[0]["atmos"]["z"], data["z"][:2])


def test_samples_around_missing_times_are_left_out(tmp_path: Path) -> None:
    data = make_data()
    read = opened(write(tmp_path, data.isel(time=[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])))
    # Without time 5: no sample at 3 to 6.
    assert read.times.tolist() == [seconds(TIMES[i]) for i in (1, 2, 7, 8, 9)]
    assert np.array_equal(read[2]["target_surf"]["2t"], data["t2m"][8:10])
    origin = read.origin
    assert (origin.times, origin.missing, origin.left_out) == (12, 1, 4)
    assert origin.first_gap == "2020-01-02T06:00"


def test_a_time_that_one_variable_lacks_is_missing(tmp_path: Path) -> None:
    data = make_data()
    write(tmp_path, data[["t2m", "msl", "lsm", "zs"]], "two/surface.nc")
    write(tmp_path, data[["t", "z"]].drop_isel(time=11), "two/levels.nc")
    assert opened(tmp_path / "two").times[-1] == seconds(TIMES[8])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"start": "2020-01-02"}, range(5, 10)),
        ({"end": "2020-01-02T00:00:00Z"}, range(1, 2)),
        ({"start": "2020-01-01T06:00", "end": "2020-01-03T01:00+01:00"}, range(2, 6)),
        ({"stride": 3}, (3, 6, 9)),
        ({"stride": 4, "start": "2020-01-01T06:00"}, (5, 9)),
    ],
)
def test_splits_by_time(tmp_path: Path, options: dict[str, Any], kept: Any) -> None:
    read = opened(write(tmp_path, make_data()), options)
    assert read.times.tolist() == [seconds(TIMES[i]) for i in kept]


def test_hourly_data_for_a_model_of_six_hours(tmp_path: Path) -> None:
    times = TIMES[0] + np.arange(30) * np.timedelta64(1, "h")
    data = make_data(times=times)
    path = write(tmp_path, data)
    assert len(opened(path)) == 12
    assert np.array_equal(opened(path)[1]["surf"]["2t"], data["t2m"][[1, 7]])
    assert len(opened(path, {"stride": 6})) == 2


def test_hours_that_are_no_binary_fraction(tmp_path: Path) -> None:
    times = TIMES[0] + np.arange(8) * np.timedelta64(4 * 60 + 6, "m")
    path = write(tmp_path, make_data(times=times))
    assert len(opened(path, timestep_hours=4.1)) == 5


def test_packed_numbers_become_float32(tmp_path: Path) -> None:
    data = make_data()
    packed = tmp_path / "packed.nc"
    encoding = {"t2m": {"dtype": "int16", "scale_factor": 1e-3, "_FillValue": -32767}}
    data["t2m"][1, 0, 0] = np.nan
    data.to_netcdf(packed, encoding=encoding)
    values = opened(packed)[0]["surf"]["2t"]
    assert values.dtype == np.float32
    assert np.isnan(values).sum() == 1
    assert np.allclose(values, data["t2m"][:2], atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "context"), [("era5.nc", "fork"), ("era5.zarr", "fork"), ("era5.nc", "spawn")]
)
def test_workers_read_the_same_samples(tmp_path: Path, name: str, context: str) -> None:
    read = opened(write(tmp_path, make_data(), name))
    # Files are open here when the workers start.
    here = [read[i] for i in range(len(read))]
    loader = DataLoader(
        read,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=2,
        multiprocessing_context=context,
    )
    there = list(loader)
    assert len(there) == len(here)
    assert all(same(a, b) for a, b in zip(there, here, strict=True))
    assert same(pickle.loads(pickle.dumps(read))[0], here[0])


def test_each_process_opens_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = opened(write(tmp_path, make_data()))
    calls: list[int] = []
    monkeypatch.setattr(
        weather_data, "open_file", lambda path: calls.append(1) or handles.open_file(path)
    )
    first = read[0]
    assert same(read[0], first)
    assert len(calls) == 1
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert same(read[0], first)
    assert len(calls) == 2


def test_one_file_in_several_data_sets(tmp_path: Path) -> None:
    """While one reads, another that looks into the same files must not close them."""
    data = make_data()
    write(tmp_path, data[["z"]], "files/a.nc")
    write(tmp_path, data[["t2m", "lsm"]], "files/b.nc")
    options: dict[str, Any] = {"rename": {}}
    names = {"surf_vars": ("2t",), "static_vars": ("lsm",), "atmos_vars": ("z",)}
    first = opened(tmp_path / "files", options, **names)
    sample = first[0]
    second = opened(tmp_path / "files", {**options, "start": "2020-01-01T12:00"}, **names)
    assert same(second[0], first[2])
    assert same(first[0], sample)
    handles = [set(map(id, read._opened.values())) for read in (first, second)]
    assert handles[0] == handles[1] != set()


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data()
    for i in range(12):
        write(tmp_path, data.isel(time=[i]), f"days/{i:02}.nc")
    monkeypatch.setattr(weather_data, "OPEN_FILES", 2)
    read = opened(tmp_path / "days")
    assert np.array_equal(read[8]["target_atmos"]["z"], data["z"][10:])
    assert len(read._opened) == 2


def test_a_sample_reads_its_own_times_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = opened(write(tmp_path, make_data(), "era5.zarr"))
    keys: list[str] = []
    get = zarr.storage.LocalStore.get

    async def counted(store: Any, key: str, *arguments: Any, **keywords: Any) -> Any:
        if "/c/" in key:
            keys.append(key)
        return await get(store, key, *arguments, **keywords)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", counted)
    read[4]
    chunks = [key for key in keys if key.split("/")[0] in ("t2m", "msl", "t", "z")]
    assert sorted(chunks) == sorted(
        [f"{v}/c/{t}/0/0" for v in ("t2m", "msl") for t in (4, 5, 6, 7)]
        + [f"{v}/c/{t}/0/0/0" for v in ("t", "z") for t in (4, 5, 6, 7)]
    )
    assert not [key for key in keys if key.startswith(("lsm", "zs"))]


def test_a_sample_may_be_changed_in_place(tmp_path: Path) -> None:
    read = opened(write(tmp_path, make_data()))
    first = read[0]
    for kind in ("static", "surf"):
        for values in first[kind].values():
            values += 1
    lat = first["lat"]
    lat += 1
    assert not same(read[0], first)
    assert same(read[0], opened(tmp_path / "era5.nc")[0])


def test_real_era5(norway: Path) -> None:
    read = opened(
        norway / "norway_surface.nc",
        {"static": str(norway / "norway_static.nc"), "rename": {}},
        surf_vars=("2t", "10u", "10v", "msl"),
        static_vars=("lsm", "z", "slt"),
        atmos_vars=(),
    )
    assert len(read) == 25
    sample = read[24]
    assert {v.shape for v in sample["surf"].values()} == {(2, 64, 112)}
    assert {v.shape for v in sample["target_surf"].values()} == {(2, 64, 112)}
    assert {v.shape for v in sample["static"].values()} == {(64, 112)}
    assert (sample["atmos"], sample["target_atmos"]) == ({}, {})
    assert (read.lat[0], read.lat[-1], read.lon[0], read.lon[-1]) == (72.75, 57, 4, 31.75)
    assert read.origin.missing == 0
    checks = weather_checks()
    data = CheckData([("norway", "train", [read[i] for i in range(len(read))])], {})
    assert [finding for check in checks for finding in check(data)] == []
    statistics = compute_statistics(read)
    for name, entry in statistics.items():
        location, scale = aurora_locations()[name]
        assert abs(entry["location"] - location) < scale
        assert 0.1 < entry["scale"] / scale < 1
