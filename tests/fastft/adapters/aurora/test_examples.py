"""The run files of examples/aurora, scaled down: trained, evaluated, exported, read by upstream."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from upstream_aurora import upstream_model, write_weather

EXAMPLES = Path(__file__).parents[4] / "examples" / "aurora"
# Six-hourly steps from 2020 to the first of January of these years.
YEARS = {"new-variables": 1464, "lora": 1464, "rollout": 2924}
NEW = {
    "surf_vars": {"tp": {"location": 0.0, "scale": 0.002}},
    "atmos_vars": {"r": {"location": 50.0, "scale": 30.0}},
}


def test_they_are_short() -> None:
    files = sorted(EXAMPLES.glob("*.toml"))
    assert {file.stem for file in files} == set(YEARS)
    assert all(len(file.read_text().splitlines()) <= 40 for file in files)


@pytest.fixture
def small(make_adapter: Any, build: Any, project: Path) -> Callable[[str], list[str]]:
    """Data, a pretrained checkpoint and overrides for an example, in the current folder."""

    def make(name: str) -> list[str]:
        pretrained = make_adapter()
        pretrained.save(build(pretrained), Path("aurora-0.25-pretrained.ckpt"))
        variables = make_adapter(**NEW if name == "new-variables" else {}).variables
        folder = Path("hres" if name == "rollout" else "era5")
        folder.mkdir()
        for first in (-8, 0):
            write_weather(folder / f"from{first}.nc", variables, YEARS[name] + first, 8)
        arguments = ", ".join(f"{k} = {v}" for k, v in pretrained.options.arguments.items())
        return [
            *("run.device=cpu", "run.steps=3", "run.folder=run", "data.workers=0"),
            *("step.precision=fp32", "step.compile=off", "optim.schedule.warmup_steps=1"),
            *("evaluate.every_steps=3", "model.options.levels=[500, 850]"),
            f"model.options.arguments={{ {arguments} }}",
        ]

    return make


def run(fastft: Callable[..., Any], name: str, overrides: Sequence[str], *scored: str) -> str:
    """Trains, evaluates with the overrides in `scored` and exports; returns what training said."""
    file = str(EXAMPLES / f"{name}.toml")
    said = fastft("train", file, *overrides)
    assert (said.errors, said.code) == ("", 0)
    for command in (["evaluate", *scored], ["export", "--to", "tuned.ckpt"]):
        outcome = fastft(command[0], file, *command[1:], *overrides)
        assert (outcome.errors, outcome.code) == ("", 0)
    assert Path("run/evaluation-validation/scores.csv").is_file()
    theirs = upstream_model(json.loads(Path("tuned.ckpt.json").read_text()))
    theirs.load_checkpoint_local("tuned.ckpt", strict=True)
    return said.output


def changed(prefix: str = "") -> set[str]:
    """Tensors that differ from those of the pretrained checkpoint, or that it has not."""
    before = torch.load("aurora-0.25-pretrained.ckpt", weights_only=True)
    after = torch.load("tuned.ckpt", weights_only=True)
    return {n for n, t in after.items() if n not in before or not torch.equal(t, before[n])}


def test_new_variables(small: Callable[..., Any], fastft: Callable[..., Any]) -> None:
    said = run(fastft, "new-variables", small("new-variables"))
    # The guide's two rates.
    assert "0.001" in said
    assert "0.0003" in said
    scores = json.loads(Path("run/evaluation-validation.json").read_text())["values"]
    assert {"weighted_rmse/tp/6h", "weighted_rmse/r_850/6h", "acc/r_500/6h"} <= set(scores)
    names = changed()
    assert "decoder.surf_heads.tp.weight" in names
    assert "backbone.encoder_layers.0.blocks.0.attn.qkv.weight" in names


def test_lora(small: Callable[..., Any], fastft: Callable[..., Any]) -> None:
    said = run(fastft, "lora", small("lora"), "model.options.rollout_steps=4")
    assert "frozen" in said
    names = changed()
    assert names
    assert all(".lora_" in name for name in names)
    scores = json.loads(Path("run/evaluation-validation.json").read_text())["values"]
    assert "weighted_rmse/z_500/24h" in scores


def test_roll_out(small: Callable[..., Any], fastft: Callable[..., Any]) -> None:
    said = run(fastft, "rollout", small("rollout"))
    assert "5e-05" in said
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    steps = {"train/step-1", "train/step-2"}
    assert any(steps <= set(record) for record in records)
    assert "decoder.surf_heads.2t.weight" in changed()
