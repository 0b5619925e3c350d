"""Roll-out fine-tuning with a replay buffer: predictions become data, and runs can go on."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from upstream_aurora import write_weather
from waits import Waits

from fastft.adapters.aurora.batch import first_state
from fastft.config import DataSource
from fastft.errors import ConfigError
from fastft.replay import ReplayBuffer
from fastft.task import Batch

CPU = torch.device("cpu")

RUN = """\
[run]
folder = "{folder}"
steps = 8
device = "cpu"

[model]
adapter = "aurora"

[model.options]
model_class = "Aurora"
levels = [500, 850]
arguments = {{ {arguments} }}

[data]
batch_size = 2
workers = {workers}
train = [{{ path = "train.nc", options = {{ static = "static.nc" }} }}]
replay = {{ size = 3, refresh = 3, longest = 4, save = {save} }}

[optim]
lr = 1e-2
schedule = {{ name = "constant" }}

[checkpoint]
every_steps = 4

[log]
every_steps = 1
tensorboard = false
"""


@pytest.fixture
def run(make_adapter: Any, fastft: Callable[..., Any], project: Path) -> Callable[..., Any]:
    """Trains; returns the weights after the last step."""
    adapter = make_adapter(model_class="Aurora")
    write_weather(Path("train.nc"), adapter.variables, 0, 10)
    arguments = ", ".join(f"{k} = {v}" for k, v in adapter.options.arguments.items())

    def train(folder: str, *settings: str, workers: int = 0, save: bool = True) -> Any:
        text = RUN.format(
            folder=folder, workers=workers, save=str(save).lower(), arguments=arguments
        )
        Path("run.toml").write_text(text)
        outcome = fastft("train", "run.toml", *settings)
        assert (outcome.errors, outcome.code) == ("", 0)
        return load_file(sorted(Path(folder).glob("checkpoints/*/model.safetensors"))[-1])

    return train


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_on_bit_for_bit(run: Callable[..., Any]) -> None:
    whole = run("whole")
    assert same(run("workers", workers=2), whole)
    run("parts", "run.steps=4")
    assert same(run("parts", "--resume"), whole)
    # Without the buffer, a resumed run begins with data.
    run("short", "run.steps=4", save=False)
    assert not same(run("short", "--resume", save=False), whole)
    assert same(run("other", save=False), whole)


def test_no_further_than_the_updates_that_are_trained(
    run: Callable[..., Any], fastft: Callable[..., Any]
) -> None:
    run("full", "run.steps=1", "model.options.arguments.lora_steps=3")
    lora = ("run.folder=lora", "finetune.method=lora")
    pushed = ("model.options.rollout_steps=2", "model.options.loss.pushforward=true")
    for most, settings in ((3, ()), (2, pushed)):
        settings = (*lora, *settings, "model.options.arguments.lora_steps=3")
        outcome = fastft("train", "run.toml", *settings)
        assert outcome.code == 2
        assert outcome.problems == [
            f"data.replay.longest: must be at most {most}, the steps that the model's own low-rank"
            " updates are for, since nothing else is trained; got 4; lower it"
        ]
        assert not Path("lora").exists()
        assert fastft("train", "run.toml", *settings, f"data.replay.longest={most}").code == 0
        shutil.rmtree("lora")
    # Something else has gradients.
    settings = (*settings, "finetune.method=full", "data.batch_size=1")
    assert fastft("train", "run.toml", *settings).code == 0


def batches_of(adapter: Any, path: Path, count: int) -> list[Batch]:
    """One entry of a buffer, drawn `count` times."""
    data = adapter.dataset(DataSource(path=path, options={"static": Path("static.nc")}), "train")
    return [
        Batch(adapter.collate([data[number]]), 1, slots=(0,), leads=(number,))
        for number in range(count)
    ]


@pytest.mark.usefixtures("project")
def test_an_entry_is_rolled_out(make_adapter: Any, build: Any) -> None:
    """With frozen weights, the entry's steps are those of a roll-out from its first state."""
    settings = {"model_class": "Aurora", "arguments": {"lora_mode": "all", "lora_steps": 3}}
    adapter, longer = make_adapter(**settings), make_adapter(**settings, rollout_steps=3)
    write_weather(Path("train.nc"), adapter.variables, 0, 8)
    task = build(adapter)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.5)
    buffer = ReplayBuffer(task.carry, CPU, saved=True)
    losses = []
    batches = batches_of(adapter, Path("train.nc"), 3)
    with Waits() as waits:
        for batch in batches:
            filled = buffer.fill(batch)
            loss = task.loss(task.model, filled)
            assert loss.total.requires_grad
            buffer.keep(filled, loss.predictions)
            losses.append(loss.total.detach())
    assert waits.found == []
    (start,) = batches_of(longer, Path("train.nc"), 1)
    whole = build_like(longer, task).loss
    with torch.no_grad():
        parts = whole(task.model, dataclasses.replace(start, slots=(), leads=())).parts
    for number, value in enumerate(losses, start=1):
        torch.testing.assert_close(value, parts[f"step-{number}"], rtol=1e-6, atol=0)


def build_like(adapter: Any, task: Any) -> Any:
    return adapter.build(None, device=CPU, checkpoint=None, pretrained=False)


@pytest.mark.usefixtures("project")
def test_what_is_not_finite_is_replaced_by_data(make_adapter: Any, build: Any) -> None:
    adapter = make_adapter(masked=["2t"])
    write_weather(Path("train.nc"), adapter.variables, 0, 6)
    task = build(adapter)
    first, second = batches_of(adapter, Path("train.nc"), 2)
    first["2t"][..., :3, :] = torch.nan
    predictions = {
        name: torch.full_like(first[name], torch.nan)
        for name in (*adapter.variables.surf, *adapter.variables.atmos)
    }
    predictions["msl"] = first["msl"] + 1
    (state,) = task.carry.states(first, predictions)
    started = task.carry.start(second, [state])
    assert torch.equal(started["surf"]["msl"][:, -1], first["msl"][:, 0] + 1)
    assert torch.equal(started["surf"]["msl"][:, 0], first["surf"]["msl"][:, 1])
    # Data where there are some, else the location.
    assert torch.equal(started["surf"]["10u"], second["surf"]["10u"])
    assert torch.equal(started["atmos"]["q"], second["atmos"]["q"])
    location = np.float32(adapter.variables.statistics["2t"].location)
    assert (started["surf"]["2t"][:, 1, :3] == location).all()
    assert torch.equal(started["surf"]["2t"][:, 1, 3:], second["surf"]["2t"][:, 1, 3:])
    # The loader's batch stays as it was.
    assert not torch.equal(second["surf"]["msl"], started["surf"]["msl"])
    assert first_state(started.data).metadata.time == first_state(second.data).metadata.time


@pytest.mark.parametrize(
    ("arguments", "leads", "fit"),
    [
        ({"lora_mode": "all"}, (1, 2), False),
        ({"lora_mode": "from_second"}, (0, 2), False),
        ({"lora_mode": "from_second"}, (1, 2), True),
        ({"lora_steps": 3}, (3, 1), False),
        ({"lora_steps": 3}, (3, 4), True),
        ({}, (0, 2), True),
    ],
)
def test_leads_that_go_together(
    arguments: dict[str, Any],
    leads: tuple[int, ...],
    fit: bool,
    make_adapter: Any,
    build: Any,
    make_samples: Any,
) -> None:
    adapter = make_adapter(model_class="Aurora", arguments=arguments)
    task = build(adapter)
    batch = Batch(adapter.collate(make_samples(adapter)), 2, slots=(0, 1), leads=leads)
    if fit:
        assert task.loss(task.model, batch).total.isfinite()
        return
    with pytest.raises(
        ConfigError, match=rf"carried on equally far, .* got {leads[0]}, {leads[1]} s"
    ):
        task.loss(task.model, batch)
