"""What happens around the steps: saving, evaluation, warnings, signals, folders."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastft.checkpoint import best_checkpoint, latest_checkpoint, read_meta

STEPS = ["train", "run.toml", "run.steps=12", "checkpoint.every_steps=3", "log.every_steps=1"]

# A model that turns its own weights or a batch into NaN, or asks to stop, at a chosen call.
EVENTFUL = """\
import os
import signal

import torch
from torch import nn
from torch.nn import functional

calls = 0
AT = {at}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(self.norm(x))


def build():
    return Net(), loss


def loss(model, batch):
    global calls
    inputs = batch["inputs"]
    if model.training:
        calls += 1
        if calls == AT:
            {event}
    return functional.cross_entropy(model(inputs), batch["targets"])
"""


@pytest.fixture
def eventful(project: Path) -> Callable[..., None]:
    """Replaces the project's model; its loss is its own."""

    def write(event: str = "pass", at: int = 0) -> None:
        Path("model.py").write_text(EVENTFUL.format(event=event, at=at))
        text = Path("run.toml").read_text()
        Path("run.toml").write_text(text.replace('[[loss.terms]]\nname = "cross_entropy"\n', ""))

    return write


def saved_steps() -> list[int]:
    folders = sorted(Path("run/checkpoints").iterdir())
    return [int(folder.name.removeprefix("step-")) for folder in folders]


def logged(name: str) -> list[float]:
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_the_best_checkpoint_is_kept_beside_the_last(project: Path, fastft) -> None:
    metric = 'evaluate.metrics=[{name="accuracy"}]'
    best = ["checkpoint.monitor=accuracy", "checkpoint.mode=max", "checkpoint.keep_last=1"]
    outcome = fastft(*STEPS, "evaluate.every_steps=1", metric, *best, "optim.lr=0.1")
    assert outcome.code == 0, outcome.errors
    values = logged("validation/accuracy")
    folder = best_checkpoint(Path("run"))
    assert folder is not None
    assert read_meta(folder)["value"] == max(values)
    assert set(saved_steps()) == {read_meta(folder)["step"], 12}


def test_weights_that_are_not_finite_do_not_push_out_good_ones(eventful, fastft) -> None:
    eventful("model.linear.weight.data.fill_(float('nan'))", at=8)
    outcome = fastft(*STEPS, "gradients.on_nonfinite=warn", "data.validation=[]")
    assert outcome.code == 3
    assert saved_steps() == [3, 6]
    assert "step 9: 4 tensors are not finite, as norm.weight; not saved" in outcome.output
    assert "step 12: 4 tensors are not finite" in outcome.errors


def test_a_skipped_step_leaves_the_running_statistics(eventful, fastft) -> None:
    eventful("inputs = inputs * float('nan')", at=5)
    outcome = fastft(*STEPS)
    assert outcome.code == 0, outcome.errors
    assert "non-finite gradients in 1 steps" in outcome.output
    assert all(np.isfinite(value) for value in logged("validation/loss"))
    assert logged("gradients/skipped")[-1] == 1


def test_parameters_without_a_gradient_are_named_once(eventful, fastft) -> None:
    eventful()
    outcome = fastft(*STEPS)
    assert outcome.output.count("2 trained tensors have had no gradient so far") == 1
    assert "as unused." in outcome.output


def test_fastfts_adam_logs_its_updates(eventful, fastft) -> None:
    """With torch's there are none to log."""
    eventful("inputs = inputs * float('nan')", at=5)
    settings = ["optim.moments=8bit", "optim.weight_decay=0.1", "run.steps=60"]
    outcome = fastft(*STEPS, *settings, "gradients.zclip={warmup_steps = 2}")
    assert outcome.code == 0, outcome.errors
    assert "fastft's adamw" in outcome.output
    for name in ("group/default", "group/default, no decay", "layer/linear"):
        values = logged(f"updates/{name}")
        assert len(values) == 60
        assert all(0 < value < 0.5 for value in values)
    assert set(logged("updates/layer/unused")) == {0.0}
    losses = logged("train/loss")
    assert sum(losses[-10:]) < 0.8 * sum(losses[5:15])
    assert fastft(*STEPS, "run.folder=plain").code == 0
    assert "updates/" not in Path("plain/metrics.jsonl").read_text()


def test_a_failing_evaluation_does_not_cost_the_training(project: Path, fastft) -> None:
    inputs = np.zeros((16, 4), np.float32)
    inputs[:, 0] = np.arange(16)
    targets = np.zeros(16, np.int64)
    targets[-1] = 7
    np.savez("validation.npz", inputs=inputs, targets=targets)
    ignored = 'data.checks.ignore=["labels", "constant", "imbalance"]'
    outcome = fastft("train", "run.toml", ignored, "data.evaluation_batch_size=4")
    assert outcome.code == 2
    assert "labels must be from 0 to 2" in outcome.errors
    assert saved_steps() == [2]


def test_what_is_wrong_with_the_evaluation_shows_before_the_first_step(eventful, fastft) -> None:
    eventful()
    for arguments in (["--dry-run"], []):
        outcome = fastft("train", "run.toml", 'evaluate.metrics=[{name="accuracy"}]', *arguments)
        assert outcome.code == 2
        assert "metric 'accuracy'" in outcome.errors
        assert not Path("run").exists()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.validation=[]", "evaluate.every_steps=1"], "evaluate.every_steps: needs data"),
        (["checkpoint.monitor=acuracy"], "checkpoint.monitor: must be a value"),
        (
            ['evaluate.metrics=[{name="f1"}]', "checkpoint.monitor=f1/class_0"],
            "checkpoint.monitor: must be a value",
        ),
    ],
)
def test_settings_of_an_evaluation_that_will_not_be(
    overrides: list[str], problem: str, project: Path, fastft
) -> None:
    outcome = fastft("train", "run.toml", *overrides)
    assert outcome.code == 2
    assert problem in outcome.errors


HOLD = "import fcntl, sys; f = open('run/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); "


def test_a_folder_in_use_is_refused(project: Path, fastft) -> None:
    Path("run").mkdir()
    command = [sys.executable, "-uc", HOLD + "sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        outcome = fastft("train", "run.toml")
        other.stdin.close()
    assert outcome.code == 2
    assert "in use by another run" in outcome.errors
    assert fastft("train", "run.toml").code == 0


def test_a_signal_with_weights_that_are_not_finite_does_not_claim_a_save(eventful, fastft) -> None:
    event = "model.linear.weight.data.fill_(float('nan')); os.kill(os.getpid(), signal.SIGTERM)"
    eventful(event, at=8)
    outcome = fastft(*STEPS, "gradients.on_nonfinite=warn")
    assert outcome.code == 3
    assert "were not saved" in outcome.errors
    assert saved_steps() == [3, 6]


def test_a_signal_after_a_save_does_not_save_again(
    eventful, fastft, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastft.loop import hooks

    saves: list[int] = []
    save = hooks.save_checkpoint

    def counting(folder: Path, step: int, *arguments: Any, **settings: Any) -> Path:
        saves.append(step)
        return save(folder, step, *arguments, **settings)

    monkeypatch.setattr(hooks, "save_checkpoint", counting)
    eventful("os.kill(os.getpid(), signal.SIGTERM)", at=6)
    assert fastft(*STEPS).code == 4
    assert saves == [3, 6]


def test_a_signal_that_comes_twice_is_one(eventful, fastft) -> None:
    """As a launcher forwards what the whole group has got."""
    eventful("os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)", at=5)
    assert fastft(*STEPS).code == 4
    assert saved_steps() == [3, 5]


def test_running_statistics_that_are_not_finite_are_not_saved(eventful, fastft) -> None:
    eventful("model.norm.running_var.fill_(float('inf'))", at=8)
    outcome = fastft(*STEPS, "data.validation=[]")
    assert outcome.code == 3
    assert "1 tensors are not finite, as norm.running_var" in outcome.errors
    assert saved_steps() == [3, 6]


def test_ctrl_c_before_training_ends_at_once(
    project: Path, fastft, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastft import train

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "check_run_data", interrupted)
    # A shell makes jobs in its background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert fastft("train", "run.toml").code == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not Path("run").exists()


def test_a_finished_run_is_done(project: Path, fastft) -> None:
    assert fastft("train", "run.toml").code == 0
    outcome = fastft("train", "run.toml", "--resume")
    assert outcome.code == 0
    assert "nothing to do: step 2 of 2 is done" in outcome.output


def test_a_moved_run_goes_on_and_other_data_does_not(project: Path, fastft) -> None:
    assert fastft("train", "run.toml").code == 0
    Path("run").rename("moved")
    more = ["run.folder=moved", "run.steps=4", "--resume"]
    assert fastft("train", "run.toml", *more).code == 0
    assert latest_checkpoint(Path("moved")) == Path("moved/checkpoints/step-00000004")
    inputs = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    np.savez("train.npz", inputs=inputs, targets=inputs[:, :3].argmax(1))
    outcome = fastft("train", "run.toml", "run.folder=moved", "run.steps=6", "--resume")
    assert outcome.code == 2
    assert "it had train.npz 40 samples, now train.npz 50" in outcome.errors
