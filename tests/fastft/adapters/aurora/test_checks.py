"""Weather checks, one by one: good data yields nothing, each fault its finding."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from fastft.adapters.aurora.checks import WEATHER_CHECKS, aurora_locations, weather_checks
from fastft.adapters.aurora.data import Origin
from fastft.task import CheckData, Finding

LEVELS = [200, 500, 850, 1000]
SHAPE = (8, 16)
GOOD = Origin(
    times=12,
    missing=0,
    first_gap="",
    left_out=0,
    latitudes=(8.0, 1.0),
    longitudes=(20.0, 35.0),
    flipped=False,
    rolled=False,
)


def make_samples(count: int = 3) -> list[dict[str, Any]]:
    """Values as aurora's statistics have them."""
    random = np.random.default_rng(0)
    known = aurora_locations()

    def field(name: str, *lead: int) -> np.ndarray:
        location, scale = known[name]
        values = location + 0.3 * scale * random.normal(size=(*lead, *SHAPE))
        return values.astype(np.float32)

    def column(name: str, steps: int) -> np.ndarray:
        return np.stack([field(f"{name}_{level}", steps) for level in LEVELS], axis=1)

    surf, atmos = ("2t", "10u", "msl"), ("z", "t", "q", "u")
    mask = np.zeros(SHAPE, np.float32)
    mask[:, 8:] = 1
    return [
        {
            "surf": {n: field(n, 2) for n in surf},
            "atmos": {n: column(n, 2) for n in atmos},
            "target_surf": {n: field(n, 1) for n in surf},
            "target_atmos": {n: column(n, 1) for n in atmos},
            "static": {"lsm": mask, "z": random.normal(size=SHAPE).astype(np.float32)},
            "time": np.int64(0),
            "lat": np.arange(8, 0, -1, dtype=np.float32),
            "lon": np.arange(20, 36, dtype=np.float32),
            "levels": LEVELS,
            "origin": GOOD,
        }
        for _ in range(count)
    ]


def findings(samples: Iterable[dict[str, Any]], **options: Any) -> list[Finding]:
    data = CheckData([("era5", "train", samples)], {})
    return [finding for check in weather_checks(**options) for finding in check(data)]


def changed(
    kind: str, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> list[dict[str, Any]]:
    samples = copy.deepcopy(make_samples())
    for sample in samples:
        for key in (kind, f"target_{kind}"):
            sample[key][name] = change(sample[key][name])
    return samples


def with_origin(**changes: Any) -> list[dict[str, Any]]:
    origin = Origin(**(vars(GOOD) | changes))
    return [sample | {"origin": origin} for sample in make_samples()]


def test_good_data_yields_no_finding() -> None:
    assert findings(make_samples()) == []


def test_names_are_what_data_checks_ignore_takes() -> None:
    assert [check.__name__ for check in weather_checks()] == [
        *("weather_units", "missing_hours", "missing_values", "level_order"),
        *("grid_order", "constant_fields", "weather_statistics"),
    ]
    assert len(WEATHER_CHECKS) == 7


@pytest.mark.parametrize(
    ("kind", "name", "change", "given", "advice"),
    [
        ("surf", "2t", lambda v: v - 273.15, "degrees Celsius", "add 273.15 in the files"),
        ("atmos", "t", lambda v: v - 273.15, "degrees Celsius", "add 273.15 in the files"),
        (
            "surf",
            "2t",
            lambda v: 75 + (v - v.mean()) * 1.8,
            "degrees Fahrenheit",
            "multiply by 0.555556 and add 255.372 in the files",
        ),
        (
            "atmos",
            "z",
            lambda v: v / 9.80665,
            "geopotential height in metres",
            "multiply by 9.80665 in the files",
        ),
        (
            "atmos",
            "z",
            lambda v: v / 98.0665,
            "geopotential height in decametres",
            "multiply by 98.0665 in the files",
        ),
        ("surf", "msl", lambda v: v / 100, "hPa", "multiply by 100 in the files"),
        ("surf", "msl", lambda v: v / 1000, "kPa", "multiply by 1000 in the files"),
        ("atmos", "q", lambda v: v * 1000, "g/kg", "multiply by 0.001 in the files"),
    ],
)
def test_units(kind: str, name: str, change: Any, given: str, advice: str) -> None:
    (finding,) = findings(changed(kind, name, change))
    assert (finding.check, finding.severity) == ("weather-units", "error")
    assert finding.where == f"era5 (train): {name}"
    assert finding.what.endswith(f"got what looks like {given}")
    assert finding.advice == advice


def test_missing_hours() -> None:
    gap = {"missing": 3, "first_gap": "2020-01-02T06:00", "left_out": 5}
    (finding,) = findings(with_origin(**gap))
    assert (finding.check, finding.severity, finding.count) == ("missing-hours", "warning", 3)
    assert "got 3 of 12 missing (25.0%), which leaves 5 samples out" in finding.what
    assert finding.example == "the first is 2020-01-02T06:00"


def test_samples_of_another_reader_have_no_origin() -> None:
    samples = make_samples()
    for sample in samples:
        del sample["origin"]
    assert findings(samples) == []


@pytest.mark.parametrize(
    ("columns", "place"),
    [(slice(0, 4), "12.50%, all over sea"), (slice(12, 16), "all over land"), (slice(4), "12.5")],
)
def test_missing_values(columns: slice, place: str) -> None:
    def fault(values: np.ndarray) -> np.ndarray:
        values[..., :4, columns] = np.nan
        return values

    (finding,) = findings(changed("surf", "2t", fault))
    assert (finding.check, finding.severity) == ("missing-values", "error")
    assert (finding.where, finding.count) == ("era5 (train): 2t", 3 * 3 * 16)
    assert place in finding.what
    assert findings(changed("surf", "2t", fault), masked=["2t"]) == []


def test_masked_variables() -> None:
    """Their NaN are no fault; infinities are, and so is NaN alone."""
    samples = changed("surf", "2t", lambda values: np.where(values > 280, np.nan, values))
    samples[1]["target_surf"]["2t"][0, 0, :2] = np.inf
    (finding,) = findings(samples, masked=["2t"])
    assert (finding.check, finding.count, finding.example) == ("missing-values", 2, "sample 1")
    samples = changed("atmos", "u", lambda values: np.full_like(values, np.nan))
    (finding,) = findings(samples, masked=["u"])
    assert (finding.where, finding.severity) == ("era5 (train): u", "error")
    assert finding.what == "a masked variable must have values somewhere; got NaN alone"


def test_a_missing_value_anywhere() -> None:
    samples = copy.deepcopy(make_samples())
    samples[2]["target_atmos"]["u"][0, 1, 2, 3] = np.inf
    samples[2]["target_atmos"]["u"][0, 1, 2, 13] = np.inf
    samples[0]["static"]["z"][1, 2] = np.nan
    first, second = findings(samples)
    assert (first.where, first.count, first.example) == ("era5 (train): u", 2, "sample 2")
    assert "over" not in first.what
    assert (second.where, second.example) == ("era5 (train): z (static)", "row 1, column 2")


@pytest.mark.parametrize(
    ("name", "order", "got"),
    [
        ("z", [3, 2, 1, 0], "must fall with pressure; got the reverse"),
        ("z", [0, 2, 1, 3], "must fall with pressure; got another order"),
        ("t", [3, 2, 1, 0], "must rise with pressure; got the reverse"),
    ],
)
def test_swapped_levels(name: str, order: list[int], got: str) -> None:
    found = findings(changed("atmos", name, lambda v: v[:, order]))
    (finding,) = [f for f in found if f.check == "level-order"]
    assert (finding.severity, finding.where) == ("error", f"era5 (train): {name}")
    assert got in finding.what
    # Whatever else is said follows from it.
    assert {f.where.split(" at ")[0] for f in found} == {finding.where}


def test_swapped_levels_are_no_other_unit() -> None:
    samples = make_samples()
    for sample in samples:
        for key in ("atmos", "target_atmos"):
            sample[key] = {name: values[:, ::-1] for name, values in sample[key].items()}
    errors = [f for f in findings(samples) if f.severity == "error"]
    assert {f.check for f in errors} == {"level-order"}
    assert {f.where for f in errors} == {"era5 (train): z", "era5 (train): t"}


def test_an_inversion_near_the_ground_is_no_swap() -> None:
    def invert(values: np.ndarray) -> np.ndarray:
        values[:, 3] = values[:, 2] - 1
        return values

    assert findings(changed("atmos", "t", invert)) == []


def test_levels_asked_for_from_the_ground_up_are_fine() -> None:
    samples = changed("atmos", "z", lambda v: v[:, ::-1])
    for sample in samples:
        sample["levels"] = LEVELS[::-1]
        for kind in ("atmos", "target_atmos"):
            sample[kind] = {n: v if n == "z" else v[:, ::-1] for n, v in sample[kind].items()}
    assert findings(samples) == []


def test_what_was_reordered_is_said() -> None:
    found = {"latitudes": (1.0, 8.0), "longitudes": (-180.0, 157.5)}
    (finding,) = findings(with_origin(flipped=True, rolled=True, **found))
    assert (finding.check, finding.severity) == ("grid-order", "warning")
    assert "rows flipped and columns reordered" in finding.what
    assert finding.example == "latitudes from 1 to 8, longitudes from -180 to 157.5"


def test_a_grid_in_the_wrong_order() -> None:
    samples = make_samples()
    samples[1]["lat"] = samples[1]["lat"][::-1]
    samples[1]["lon"] = samples[1]["lon"] - 180
    (finding,) = findings(samples)
    assert (finding.check, finding.severity) == ("grid-order", "error")
    assert finding.example == "latitudes from 1 to 8 and longitudes from -160 to -145"


def test_constant_fields() -> None:
    samples = copy.deepcopy(make_samples())
    samples[1]["surf"]["10u"][:] = 0
    samples[0]["static"]["lsm"][:] = 1
    first, second = findings(samples)
    assert (first.check, first.severity, first.count) == ("constant-fields", "warning", 1)
    assert (first.where, first.example) == ("era5 (train): 10u", "sample 1")
    assert (second.where, second.example) == ("era5 (train): lsm (static)", "1")


def test_means_and_deviations_far_from_the_models() -> None:
    far = changed("surf", "10u", lambda v: v + 100)
    (finding,) = findings(far)
    assert (finding.check, finding.severity) == ("weather-statistics", "warning")
    assert finding.where == "era5 (train): 10u"
    wide = changed("atmos", "u", lambda v: v * np.array([1, 1, 30, 1], np.float32)[:, None, None])
    (finding,) = findings(wide)
    assert finding.where == "era5 (train): u at 850 hPa"
    # A model with the data's own statistics.
    assert findings(far, statistics={"10u": (100.0, 5.0)}) == []
    assert findings(wide, statistics={"u_850": (0.0, 80.0)}) == []


def test_the_samples_are_read_once() -> None:
    class Counted:
        reads = 0

        def __iter__(self) -> Iterator[dict[str, Any]]:
            self.reads += 1
            return iter(make_samples())

    samples = Counted()
    data = CheckData([("era5", "train", samples)], {})
    checks = weather_checks()
    for check in checks:
        list(check(data))
    assert samples.reads == 1
    # Other data is read anew.
    list(checks[0](CheckData([("era5", "train", samples)], {})))
    assert samples.reads == 2
