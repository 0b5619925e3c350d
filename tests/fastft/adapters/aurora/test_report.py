"""`fastft evaluate` for weather: tables, files, TensorBoard, and options that are refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from weather_files import make_data


def test_scores_are_shown_and_written(weather_run: str, fastft: Callable[..., Any]) -> None:
    monitor = "checkpoint.monitor=weighted_rmse/z_500/12h"
    outcome = fastft("train", weather_run, monitor)
    assert (outcome.errors, outcome.code) == ("", 0)
    # One line for an evaluation, not a number for each variable.
    (line,) = [line for line in outcome.output.splitlines() if "validation  " in line]
    assert [word for word in line.split() if word.isalpha()] == [
        "step",
        "validation",
        "loss",
        "rmse",
    ]
    records = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    trained = [r for r in records if "validation/loss" in r][-1]

    outcome = fastft("evaluate", weather_run, monitor)
    assert (outcome.errors, outcome.code) == ("", 0)
    assert "anomalies from the mean over 8 of 9 training" not in outcome.output
    assert "anomalies from the mean over 9 of 9 training samples" in outcome.output
    assert outcome.output.splitlines()[-1] == "written: run/evaluation-validation"
    values = json.loads(Path("run/evaluation-validation.json").read_text())["values"]
    scores = {n: v for n, v in values.items() if n.startswith("weighted_rmse/")}
    # Training has logged the same numbers.
    assert {f"validation/{name}": value for name, value in scores.items()} == {
        name: value for name, value in trained.items() if "weighted_rmse" in name
    }
    folder = Path("run/evaluation-validation")
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [(row["variable"], row["level_hpa"], row["lead_hours"], row["unit"]) for row in rows]
    assert names[:2] == [("2t", "", "6.0", "K"), ("2t", "", "12.0", "K")]
    assert names[-1] == ("z", "850", "12.0", "m²/s²")
    assert float(rows[-1]["rmse"]) == values["weighted_rmse/z_850/12h"]
    assert float(rows[-1]["acc"]) == values["acc/z_850/12h"]
    record = json.loads((folder / "scores.json").read_text())
    assert len(record["scores"]) == len(rows) == 2 * (2 + 2 * 2)
    assert record["climatology"].startswith("the mean over 9 of 9")
    pictures = {path.name for path in (folder / "maps").iterdir()}
    variables = ("2t", "msl", "t_500", "z_500")
    assert pictures == {f"{name}-{lead}h.png" for name in variables for lead in (6, 12)}
    with Image.open(folder / "maps" / "t_500-12h.png") as image:
        assert image.format == "PNG"
    (events,) = Path("run/tensorboard/evaluation-validation").iterdir()
    reader = EventAccumulator(str(events))
    reader.Reload()
    (event,) = reader.Scalars("validation/acc/z_850/12h")
    assert (event.step, event.value) == (2, pytest.approx(values["acc/z_850/12h"]))

    # Numbers are whole on 80 columns, however many lead times there are.
    outcome = fastft("evaluate", weather_run, "model.options.rollout_steps=4")
    assert (outcome.errors, outcome.code) == ("", 0)
    assert "RMSE 24 h" in outcome.output
    assert "…" not in outcome.output
    assert len((folder / "scores.csv").read_text().splitlines()) == 1 + 4 * 6

    # Anew, with other maps: none of the old ones stay.
    maps = 'evaluate.options={maps=["t_850"], climatology="usual.nc"}'
    make_data().drop_vars("time").isel(time=0).to_netcdf("usual.nc")
    outcome = fastft("evaluate", weather_run, maps)
    assert (outcome.errors, outcome.code) == ("", 0)
    assert "anomalies from usual.nc" in outcome.output
    assert len(list((folder / "maps").iterdir())) == 2


def test_options_that_are_refused(weather_run: str, fastft: Callable[..., Any]) -> None:
    def problems(command: str, *overrides: str) -> list[str]:
        outcome = fastft(command, weather_run, *overrides)
        assert outcome.code == 2
        assert not Path("run/metrics.jsonl").exists()
        return outcome.problems

    assert problems("train", 'evaluate.options={maps=["msll"]}') == [
        "evaluate.options.maps: must name predicted variables, as 't_500'; got 'msll'; did you mean"
        " 'msl'?"
    ]
    assert problems("train", "evaluate.options.climate=1") == [
        "evaluate.options.climate: unknown key; did you mean 'climatology'?"
    ]
    assert problems("train", "checkpoint.monitor=weighted_rmse/msll/6h") == [
        "checkpoint.monitor: must be a value that evaluation reports; got 'weighted_rmse/msll/6h';"
        " did you mean 'weighted_rmse/msl/6h'?"
    ]


def test_a_damaged_climatology(weather_run: str, fastft: Callable[..., Any]) -> None:
    assert fastft("train", weather_run).code == 0
    before = set(Path("run").rglob("*"))
    outcome = fastft("evaluate", weather_run, "evaluate.options.climatology=absent.nc")
    assert outcome.code == 2
    assert (
        "evaluate.options.climatology: absent.nc must be a readable netCDF file" in outcome.errors
    )
    assert set(Path("run").rglob("*")) == before
