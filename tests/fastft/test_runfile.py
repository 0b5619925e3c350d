"""Reading run files: what becomes of every kind of value, and where a message says it stands."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fastft.adapters.registry import optim_preset
from fastft.config import CrossEntropy, Huber, NewHead
from fastft.errors import ConfigError
from fastft.runfile import format_run_file, parse, read_run_file, schema, to_tree

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.toml"))

SMALLEST = """\
[run]
folder = "runs/a"
steps = 10
[model]
adapter = "python"
[data]
train = [{ path = "a.npz" }]
[optim]
lr = 1
"""


@pytest.fixture
def smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("run.toml")
    path.write_text(SMALLEST)
    return path


def problems(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_run_file(path, overrides)
    return caught.value.problems


def test_defaults_fill_what_a_run_file_leaves_out(smallest: Path) -> None:
    config = read_run_file(smallest)
    assert config.run.folder == Path("runs/a")
    assert (config.optim.lr, config.optim.betas) == (1.0, (0.9, 0.999))
    assert config.data.train[0].path == Path("a.npz")
    assert config.ema is None
    assert config.loss.terms == ()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr = 1e-4", "optim.lr", 1e-4),
        ("run.device=cuda:1", "run.device", "cuda:1"),
        ("run.folder=runs/a=b", "run.folder", Path("runs/a=b")),
        ('run.folder="runs/quoted"', "run.folder", Path("runs/quoted")),
        ("log.tensorboard=false", "log.tensorboard", False),
        ("optim.betas=[0.8, 0.9]", "optim.betas", (0.8, 0.9)),
        ("data.train.0.path=b.npz", "data.train", "b.npz"),
        ("ema.decay=0.99", "ema.decay", 0.99),
        ("finetune.new_heads.a={init='zero'}", "finetune.new_heads", {"a": NewHead(init="zero")}),
        ("model.options.name=resnet18", "model.options", {"name": "resnet18"}),
        ("model.options.since=2020-01-31", "model.options", {"since": "2020-01-31"}),
    ],
)  # fmt: skip
def test_overrides(smallest: Path, override: str, key: str, value: Any) -> None:
    found: Any = read_run_file(smallest, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert (str(found[0].path) if key == "data.train" else found) == value


def test_later_overrides_win(smallest: Path) -> None:
    assert read_run_file(smallest, ["run.steps=2", "run.steps=3"]).run.steps == 3


def test_a_loss_is_picked_by_its_name(smallest: Path) -> None:
    terms = "loss.terms=[{name='huber',delta=2},{name='cross_entropy',class_weights=[1,2.5]}]"
    first, second = read_run_file(smallest, [terms]).loss.terms
    assert first == Huber(delta=2.0)
    assert second == CrossEntropy(class_weights=(1.0, 2.5))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.steps=2.5", "run.steps: must be an integer; got 2.5"),
        ("run.steps=true", "run.steps: must be an integer; got true"),
        ("run.steps='2'", 'run.steps: must be an integer; got "2"'),
        ("run.folder=3", "run.folder: must be ...; got 3"),
        ("log.tensorboard=0", "log.tensorboard: must be true or false; got 0"),
        ("run=3", "run: must be a table; got 3"),
        ("optim.betas=[0.9]", "optim.betas.1: must be set; got nothing; add it"),
        ("optim.betas=[0.9,1]", "optim.betas.1: must be less than 1; got 1"),
        ("optim.lr=nan", "optim.lr: must be a finite number; got NaN"),
        ("optim.lr=inf", "optim.lr: must be a finite number; got Infinity"),
        ("optim={lr=1,nesterov=true,momentum=0}", "optim: nesterov needs a momentum above 0; ..."),
        ("ema={}", "ema.decay: must be set; got nothing; add it"),
        ("finetune.unfreeze=[{at_step=99,match=['*']}]", "finetune.unfreeze.0.at_step: must be"
         " below ...; lower it"),
        ("loss.terms=[{weight=1}]", "loss.terms.0: needs a name; ...; set its 'name'"),
        ("loss.terms=[{name='mae',weight='a'}]", 'loss.terms.0.weight: must be a number; got "a"'),
        ("finetune.new_heads.head.init=ones", "finetune.new_heads.head.init: must be a known value;"
         " got 'ones'; choose from 'random', 'zero', 'inherit'"),
        ("optim.groups=[{match='head.*'}]", 'optim.groups.0.match: must be an array; got "head.*"'),
        ("optim.groups=[{match=[]}]", "optim.groups.0.match: must hold at least one entry; got"
         " none; add one"),
        ("data.train=[{paht='a'}]", "data.train.0.paht: unknown key; did you mean 'path'?"),
    ],
)  # fmt: skip
def test_problems(smallest: Path, override: str, problem: str) -> None:
    start, _, end = f"run.toml: {problem}".partition("...")
    assert any(p.startswith(start) and p.endswith(end) for p in problems(smallest, override))


def test_every_problem_is_reported_at_once(smallest: Path) -> None:
    found = problems(smallest, "optim.lrr=1", "run.steps=0", "data", "log.everysteps=3")
    assert found == (
        "override 'data': must read section.key=value, as optim.lr=1e-4",
        "run.toml: run.steps: must be greater than or equal to 1; got 0",
        "run.toml: optim.lrr: unknown key; did you mean 'lr'?",
        "run.toml: log.everysteps: unknown key; did you mean 'every_steps'?",
    )


def test_options_of_an_adapter_are_named_by_their_key() -> None:
    @dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
    class Options:
        width: int = 3

    with pytest.raises(ConfigError) as caught:
        parse(Options, {"widht": 3}, key="model.options")
    assert caught.value.problems == ("model.options.widht: unknown key; did you mean 'width'?",)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_resolved_run_file_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    overrides = ["ema.decay=0.9", "finetune.unfreeze=[{at_step=1,match=['*']}]"]
    config = read_run_file(path, overrides, optim_preset)
    copy = tmp_path / "copy.toml"
    copy.write_text(format_run_file(config))
    assert read_run_file(copy) == config
    assert to_tree(read_run_file(copy)) == to_tree(config)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_schema_accepts_the_examples_and_refuses_unknown_keys(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.validators.validator_for(schema())
    validator.check_schema(schema())
    run_file = tomllib.loads(path.read_text())
    validator(schema()).validate(run_file)
    run_file["run"]["stepps"] = 3
    with pytest.raises(jsonschema.ValidationError, match="stepps"):
        validator(schema()).validate(run_file)


def test_every_setting_is_described() -> None:
    text = json.dumps(schema())
    assert "Optimizer steps in all." in text
    undescribed = [
        f"{name}.{key}"
        for name, definition in schema()["$defs"].items()
        for key, setting in definition["properties"].items()
        if "description" not in setting and "$ref" not in setting and "const" not in setting
    ]
    assert undescribed == ["Penalty.kind"]
