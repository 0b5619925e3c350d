"""`optim.preset`: what it stands for, what wins over it, and that a run shows it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fastft.adapters.registry import optim_preset
from fastft.config import OptimConfig, ParameterRule, ScheduleConfig
from fastft.errors import ConfigError
from fastft.runfile import read_run_file

NEW = {
    "surf_vars": {"tp": {}},
    "static_vars": ["lsm", "z", "slt", "slope"],
    "atmos_vars": {"w": {"location": 0.0, "scale": 0.2}},
}
# What the five names above add.
ADDED = (
    "encoder.surf_token_embeds.weights.tp",
    "encoder.surf_token_embeds.weights.slope",
    "encoder.atmos_token_embeds.*weights.w",
    "decoder.surf_heads.tp.*",
    "decoder.atmos_heads.w.*",
)


def optim(
    path: Path,
    options: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    new_heads: tuple[str, ...] = (),
    **settings: Any,
) -> OptimConfig:
    tree = {
        "run": {"folder": "run", "steps": 2000},
        "model": {"adapter": "aurora", "options": options, **(model or {})},
        "finetune": {"new_heads": {head: {"init": "zero"} for head in new_heads}},
        "data": {"train": [{"path": "era5.nc"}]},
        "optim": settings,
    }
    file = path / "run.toml"
    file.write_text(tomli_w.dumps(tree))
    return read_run_file(file, (), optim_preset).optim


def test_the_papers_wave_recipe(tmp_path: Path) -> None:
    assert optim(tmp_path, NEW, preset="wave") == OptimConfig(
        lr=3e-4,
        groups=(ParameterRule(match=ADDED, lr=1e-3),),
        schedule=ScheduleConfig(name="cosine", warmup_steps=500, end_factor=1 / 30),
    )


def test_the_guides_rates(tmp_path: Path) -> None:
    assert optim(tmp_path, NEW, preset="guide") == OptimConfig(
        lr=3e-4, groups=(ParameterRule(match=ADDED, lr=1e-3),)
    )
    assert optim(tmp_path, {}, preset="guide") == OptimConfig(lr=3e-4)


def test_new_is_what_the_checkpoint_lacks(tmp_path: Path) -> None:
    """As of AuroraWave on weather weights, or of variables that were fine-tuned before."""
    heads = ("encoder.surf_token_embeds.weights.swh", "decoder.surf_heads.swh")
    patterns = tuple(pattern for head in heads for pattern in (head, f"{head}.*"))
    checkpoint = {"checkpoint": "weather.ckpt"}
    for name in ("guide", "wave", "pollution"):
        settings = {"preset": name, "new_heads": heads}
        (rule,) = optim(tmp_path, NEW, model=checkpoint, **settings).groups
        assert rule == ParameterRule(match=patterns, lr=1e-3)
        assert optim(tmp_path, NEW, model=checkpoint, preset=name).groups == ()
        for start in ({**checkpoint, "strict": False}, {}):
            (rule,) = optim(tmp_path, NEW, model=start, **settings).groups
            assert rule.match == (*ADDED, *patterns)


def test_what_stands_beside_a_preset_wins(tmp_path: Path) -> None:
    rule = {"match": ["decoder.*"], "lr": 1e-5}
    found = optim(
        tmp_path, NEW, preset="wave", lr=1e-4, schedule={"warmup_steps": 10}, groups=[rule]
    )
    assert found.lr == 1e-4
    assert found.schedule == ScheduleConfig(name="cosine", warmup_steps=10, end_factor=1 / 30)
    assert [rule.lr for rule in found.groups] == [1e-5]


def test_unknown_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        optim(tmp_path, {}, preset="waves")
    assert error.value.problems == (
        f"{tmp_path / 'run.toml'}: optim.preset: with the adapter 'aurora' must be one of guide,"
        " pretrain, hres-0.25, hres-0.1, pollution, wave, rollout; got 'waves'; did you mean"
        " 'wave'?",
    )
    with pytest.raises(ConfigError, match=r"optim: preset must be filled in by the adapter; got"):
        read_run_file(tmp_path / "run.toml", ["optim.lr=1"])


def test_every_preset_fits(tmp_path: Path) -> None:
    for name in ("pretrain", "hres-0.25", "hres-0.1", "pollution", "rollout"):
        found = optim(tmp_path, NEW, preset=name)
        assert bool(found.groups) == (name == "pollution")


def test_a_run_shows_its_preset_and_goes_on(weather_run: str, fastft: Callable[..., Any]) -> None:
    # In the file as 't2m' too.
    options = 'model.options.surf_vars=["2t", "msl", "2d"]'
    rename = 'data.train.0.options.rename={"static.z"="zs", "2d"="t2m"}'
    overrides = [
        'optim={preset="guide"}',
        options,
        rename,
        "data.validation=[]",
        "evaluate.metrics=[]",
    ]
    outcome = fastft("train", weather_run, *overrides, "run.steps=1")
    assert (outcome.errors, outcome.code) == ("", 0)
    rows = [line.split("│")[1:-1] for line in outcome.output.splitlines() if "│" in line]
    groups = {row[0].strip(): row[3].strip() for row in rows}
    # Long names are folded.
    assert set(groups.values()) - {""} == {"0.0003", "0.001"}
    text = Path("run/run.toml").read_text()
    assert "preset" not in text
    assert "decoder.surf_heads.2d.*" in text
    outcome = fastft("train", weather_run, *overrides, "run.steps=2", "--resume")
    assert (outcome.errors, outcome.code) == ("", 0)
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
