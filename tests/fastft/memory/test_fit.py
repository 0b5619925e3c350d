"""`data.batch_size = "fit"` on a simulated GPU, and what later starts of the run make of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fastft.blocks import KEEP, RECOMPUTE
from fastft.config import RunConfig
from fastft.errors import ConfigError, PlanError
from fastft.memory import fit, fit_batch, fitted_before
from fastft.memory.fit import with_batch_size
from fastft.memory.rehearsal import Rehearsal
from fastft.runfile import format_run_file, parse
from fastft.task import Batch

CUDA = torch.device("cuda", 0)


def make_config(folder: Path, *, plan: str = "auto", **data: Any) -> RunConfig:
    tree = {
        "run": {"folder": str(folder), "steps": 4},
        "model": {"adapter": "timm", "options": {"name": "none", "num_classes": 1}},
        "data": {"train": [{"path": "none"}], "batch_size": "fit", "samples_per_step": 24, **data},
        "optim": {"lr": 0.1},
        "memory": {"plan": plan},
    }
    return parse(RunConfig, tree, where="run.toml")


class Device:
    """Takes at most so many samples with everything kept, so many with all recomputed."""

    def __init__(self, keep: int, recompute: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = {KEEP.name: keep, RECOMPUTE.name: recompute}
        self.tried: list[tuple[str, int, int]] = []
        self.way = ""
        self.forgotten = 0
        for name, value in {
            "try_rehearsal": self.rehearse,
            "open_loader": self.open_loader,
            "enforced_limit": lambda config, device: 10**9,
        }.items():
            monkeypatch.setattr(fit, name, value)

    def rehearse(self, step: object, batches: Sequence[Batch], limit: int) -> Rehearsal | None:
        assert limit == 0.99 * 10**9
        self.tried.append((self.way, batches[0].size, len(batches)))
        return Rehearsal(1, 0.1) if batches[0].size <= self.most[self.way] else None

    def open_loader(self, adapter: object, data: Any, **_: Any) -> Any:
        size = data.micro_batch
        example = SimpleNamespace(size=size, to=lambda device: Batch({}, size))
        return SimpleNamespace(size=size, samples=40, example=lambda: example)

    def fit(self, config: RunConfig) -> tuple[RunConfig, Any]:
        def use_everywhere(way: Any) -> None:
            self.way = way.name

        def forget() -> None:
            self.forgotten += 1

        step = SimpleNamespace(
            precision=SimpleNamespace(device=CUDA),
            optimizer=SimpleNamespace(forget=forget),
            task=SimpleNamespace(model=torch.nn.Linear(1, 1)),
        )
        forwards = SimpleNamespace(use_everywhere=use_everywhere, mode="off")
        loader = self.open_loader(None, config.data)
        console = SimpleNamespace(print=lambda text: self.said.append(text))
        self.said: list[str] = []
        arguments: tuple[Any, ...] = (step, forwards, None, loader, (), console)
        return fit_batch(config, *arguments)


@pytest.mark.parametrize(
    ("keep", "recompute", "expected"),
    [(24, 24, 24), (100, 100, 24), (11, 24, 8), (1, 1, 1), (0, 5, 4), (0, 1, 1)],
)
def test_the_largest_divisor_that_fits(
    keep: int, recompute: int, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = Device(keep, recompute, monkeypatch)
    config, loader = device.fit(make_config(tmp_path))
    assert (config.data.batch_size, config.accumulate, loader.size) == (
        expected,
        24 // expected,
        expected,
    )
    # Two micro-batches stand for all; few sizes are tried; nothing of it stays.
    assert all(count == min(2, 24 // size) for _, size, count in device.tried)
    assert len(device.tried) <= 8
    assert device.forgotten == 1
    assert device.said == [
        f"data.batch_size: {expected} fits; {24 // expected} micro-batches per step"
    ]
    # A later start goes on with it where there is something to go on from.
    (tmp_path / "run.toml").write_text(format_run_file(config))
    assert fitted_before(make_config(tmp_path)) == make_config(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    keys = ("step", "monitor", "mode", "value", "metrics", "versions")
    (checkpoint / "meta.json").write_text(json.dumps({**dict.fromkeys(keys), "files": {}}))
    assert fitted_before(make_config(tmp_path)) == config
    # Of other settings, which the run is refused for.
    other = make_config(tmp_path, samples_per_step=25)
    assert fitted_before(other) == (other if expected > 1 else with_batch_size(other, 1))


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^data.batch_size: not even one sample fits"):
        Device(0, 0, monkeypatch).fit(make_config(tmp_path))


def test_without_a_plan_nothing_is_recomputed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A later start, which fits nothing, would keep everything."""
    device = Device(0, 5, monkeypatch)
    config = make_config(tmp_path, plan="off")
    with pytest.raises(PlanError, match=r"^data.batch_size: .* fits with everything kept; set"):
        device.fit(config)
    assert device.way == KEEP.name


def test_no_more_than_there_are_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, _ = Device(100, 100, monkeypatch).fit(make_config(tmp_path, samples_per_step=120))
    assert (config.data.batch_size, config.accumulate) == (40, 3)


def test_a_number_stays_and_a_cpu_is_refused(tmp_path: Path) -> None:
    cpu = SimpleNamespace(precision=SimpleNamespace(device=torch.device("cpu")))
    rest: Any = (cpu, None, None, "loader", (), None)
    config = make_config(tmp_path, batch_size=8)
    assert fit_batch(config, *rest) == (config, "loader")
    assert config.accumulate == 3
    assert fitted_before(config) is config
    with pytest.raises(ConfigError, match="'fit' needs a GPU"):
        fit_batch(make_config(tmp_path), *rest)


def test_a_plan_to_replay_wants_its_own_size(tmp_path: Path) -> None:
    assert make_config(tmp_path, batch_size=8, plan="plan.json").memory.plan == Path("plan.json")
    message = (
        "run.toml: memory.plan: must be 'auto' or 'off' with data.batch_size = 'fit', since a plan"
        " is for micro-batches of one size; got 'plan.json'; set data.batch_size to that size"
    )
    with pytest.raises(ConfigError) as caught:
        make_config(tmp_path, plan="plan.json")
    assert caught.value.problems == (message,)


def test_samples_per_step_and_accumulate(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert (config.data.micro_batch, config.accumulate) == (1, 24)
    plain = replace(config, data=replace(config.data, batch_size=4, samples_per_step=None))
    assert replace(plain, step=replace(plain.step, accumulate=5)).accumulate == 5
    make = cast(Callable[..., Any], make_config)
    with pytest.raises(ConfigError, match="must be a multiple of batch_size"):
        make(tmp_path, batch_size=7)
