"""Statistics of weather data against numpy's, and as a run file takes them."""

import tomllib
from typing import Any

import numpy as np
import pytest

from fastft.adapters.aurora.stats import Moments, compute_statistics, format_statistics
from fastft.errors import DataError

LEVELS = [500, 850]


def make_samples(count: int = 7) -> list[dict[str, Any]]:
    """Values with offsets far above their spread, as geopotential has."""
    random = np.random.default_rng(0)

    def field(offset: float, scale: float, *shape: int) -> np.ndarray:
        return (offset + scale * random.normal(size=(*shape, 8, 16))).astype(np.float32)

    return [
        {
            "surf": {"2t": field(280, 20, 2), "msl": field(1e5, 1e3, 2)},
            "atmos": {"z": field(54000, 3000, 2, 2), "q": field(1e-3, 1e-4, 2, 2)},
            "levels": LEVELS,
        }
        for _ in range(count)
    ]


def close(got: float, expected: float) -> bool:
    return abs(got - expected) <= 1e-12 * abs(expected)


def test_mean_and_deviation_are_numpys() -> None:
    samples = make_samples()
    found = compute_statistics(samples)
    assert list(found) == ["2t", "msl", "z", "q"]
    for name in ("2t", "msl"):
        values = np.stack([s["surf"][name][-1] for s in samples]).astype(np.float64)
        assert close(found[name]["location"], values.mean())
        assert close(found[name]["scale"], values.std())
    for name in ("z", "q"):
        for c, level in enumerate(LEVELS):
            values = np.stack([s["atmos"][name][-1, c] for s in samples]).astype(np.float64)
            assert close(found[name][str(level)]["location"], values.mean())
            assert close(found[name][str(level)]["scale"], values.std())


def test_a_small_spread_on_a_large_offset_survives() -> None:
    values = 1e9 + np.random.default_rng(0).normal(size=(50, 1, 100))
    moments = Moments(1)
    for part in values:
        moments.add(part)
    # numpy's own two passes round the offset to 1e-7.
    assert abs(moments.std[0] - (values - 1e9).std()) < 1e-7


def test_missing_values_do_not_count() -> None:
    samples = make_samples(3)
    samples[1]["surf"]["2t"][:, :, 3] = np.nan
    samples[2]["surf"]["2t"][:] = np.inf
    found = compute_statistics(samples)
    values = np.stack([s["surf"]["2t"][-1] for s in samples[:2]]).astype(np.float64)
    assert close(found["2t"]["location"], float(np.nanmean(values)))
    assert close(found["2t"]["scale"], float(np.nanstd(values)))


def test_as_many_samples_as_asked_for_evenly_spaced() -> None:
    samples = make_samples(9)
    assert compute_statistics(samples, 3) == compute_statistics([samples[i] for i in (0, 3, 6)])
    assert compute_statistics(samples, 100) == compute_statistics(samples)


def test_variables_without_a_scale_are_listed() -> None:
    samples = make_samples(2)
    for sample in samples:
        sample["surf"]["2t"][:] = np.nan
        sample["atmos"]["q"][:, 1] = 0
    with pytest.raises(DataError) as caught:
        compute_statistics(samples)
    assert caught.value.problems == (
        "2t: must vary to have a scale; got no finite value in 2 samples; check the file, or leave"
        " the variable out",
        "q at 850 hPa: must vary to have a scale; got 0 throughout in 2 samples; check the file, or"
        " leave the variable out",
    )


def test_the_run_file_reads_back_as_it_was() -> None:
    found = compute_statistics(make_samples())
    text = format_statistics(found)
    assert '"500" = { location = ' in text
    options = tomllib.loads(text)["model"]["options"]
    assert options == {
        "surf_vars": {n: found[n] for n in ("2t", "msl")},
        "atmos_vars": {n: found[n] for n in ("z", "q")},
    }
    odd = {"a b": {"location": 1e-30, "scale": 5e22}}
    assert tomllib.loads(format_statistics(odd))["model"]["options"]["surf_vars"] == odd


def test_the_model_takes_them() -> None:
    variables = pytest.importorskip("fastft.adapters.aurora.variables")
    samples = make_samples()
    for sample in samples:
        sample["surf"] = {"new": sample["surf"]["2t"]}
        sample["atmos"] = {"extra": sample["atmos"]["z"]}
    found = compute_statistics(samples)
    options = tomllib.loads(format_statistics(found))["model"]["options"]
    usual = {"surf_vars": ("2t",), "static_vars": ("lsm",), "atmos_vars": ("t",)}
    resolved = variables.resolve_variables(usual, options, LEVELS)
    assert resolved.statistics["new"] == (found["new"]["location"], found["new"]["scale"])
    assert resolved.levels["extra"]["850"][0] == found["extra"]["850"]["location"]
