"""`fastft stats`: from files to the tables of a run file."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from weather_files import LEVELS, make_data, write


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., Path]:
    """A run file over a small netCDF file, with these options."""
    data = write(tmp_path, make_data())

    def make(**options: Any) -> Path:
        tree = {
            "run": {"folder": str(tmp_path / "run"), "steps": 1},
            "model": {
                "adapter": "aurora",
                "options": {"levels": list(LEVELS), "static_vars": ["lsm"], **options},
            },
            "data": {"train": [{"path": str(data)}]},
            "optim": {"lr": 0.1},
        }
        path = tmp_path / "run.toml"
        path.write_text(tomli_w.dumps(tree))
        return path

    return make


def test_tables_for_all_variables(
    fastft: Callable[..., Any], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = run_file(surf_vars=["2t", "msl"], atmos_vars=["t", "z"])
    outcome = fastft("stats", str(path))
    assert (outcome.code, outcome.errors) == (0, "")
    # Pretrained weights expect the model's own.
    assert outcome.output.startswith("# model.options has no table of new variables")
    options = tomllib.loads(outcome.output)["model"]["options"]
    assert set(options["surf_vars"]) == {"2t", "msl"}
    assert set(options["atmos_vars"]["z"]) == {str(level) for level in LEVELS}
    # The last history step of each sample: all times but the first and the last.
    values = make_data()["t2m"].values[1:-1].astype(np.float64)
    found = options["surf_vars"]["2t"]
    assert found["location"] == pytest.approx(values.mean(), rel=1e-9)
    assert found["scale"] == pytest.approx(values.std(), rel=1e-9)
    assert not (tmp_path / "run").exists()


def test_tables_for_the_variables_of_tables(
    fastft: Callable[..., Any], run_file: Callable[..., Path]
) -> None:
    # Read from the file's t2m, as a variable that is new.
    path = run_file(surf_vars={"tp": {}}, atmos_vars=["t"])
    tree = tomllib.loads(path.read_text())
    tree["data"]["train"][0]["options"] = {"rename": {"tp": "t2m", "10u": "t2m", "10v": "t2m"}}
    path.write_text(tomli_w.dumps(tree))
    outcome = fastft("stats", str(path))
    assert (outcome.code, outcome.errors) == (0, "")
    assert not outcome.output.startswith("#")
    assert set(tomllib.loads(outcome.output)["model"]["options"]["surf_vars"]) == {"tp"}
    assert "atmos_vars" not in tomllib.loads(outcome.output)["model"]["options"]


def test_bad_arguments(fastft: Callable[..., Any], run_file: Callable[..., Path]) -> None:
    path = str(run_file(surf_vars=["2t", "msl"], atmos_vars=["t", "z"]))
    outcome = fastft("stats", path, "--samples", "0")
    assert (outcome.code, outcome.problems) == (
        2,
        ["--samples: must be at least 1; got 0; raise it"],
    )
