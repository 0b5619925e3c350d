"""A run that was interrupted or killed goes on as if nothing had happened: the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastft.checkpoint import latest_checkpoint, load_checkpoint

# Dropout, batch norm and a random transform: everything that draws from a generator or keeps state.
MODEL = """\
import os
import random
import signal

import torch
from torch import nn
from torch.nn import functional

calls = 0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(self.norm(self.linear(x)).relu())


def build():
    blocks = [Block() for _ in range(2)]
    return nn.Sequential(nn.Linear(4, 8), *blocks, nn.Linear(8, 3)), loss


def transform(sample, split):
    inputs = torch.from_numpy(sample["inputs"])
    if split == "train":
        inputs = inputs + 0.1 * torch.randn(4)
    return {"inputs": inputs, "targets": sample["targets"]}


def loss(model, batch):
    global calls
    if model.training:
        calls += 1
        number = os.environ.get("FASTFT_TEST_SIGNAL")
        if number and calls == int(os.environ["FASTFT_TEST_CALL"]):
            os.kill(os.getpid(), int(number))
    return functional.cross_entropy(model(batch["inputs"]), batch["targets"])
"""

RUN = """\
[run]
folder = "{folder}"
steps = 12
device = "cpu"

[model]
adapter = "python"

[model.options]
file = "noisy.py"

[data]
batch_size = 8
workers = {workers}
train = [{{ path = "train.npz", weight = 2.0 }}, {{ path = "more.npz" }}]
validation = [{{ path = "validation.npz" }}]

[optim]
lr = 1e-2
weight_decay = 0.1
schedule = {{ name = "cosine", warmup_steps = 3 }}

[gradients]
clip_norm = 1.0

[ema]
decay = 0.9

[evaluate]
every_steps = 4

[checkpoint]
every_steps = 3

[log]
every_steps = 2
tensorboard = false
"""


@pytest.fixture
def noisy(project: Path) -> Callable[..., Path]:
    """Writes a run file with a folder of its own; returns its path."""
    Path("noisy.py").write_text(MODEL)
    Path("more.npz").write_bytes(Path("validation.npz").read_bytes())

    def write(folder: str, workers: int = 0) -> Path:
        path = Path(f"{folder}.toml")
        path.write_text(RUN.format(folder=folder, workers=workers))
        return path

    return write


# The leakage check rightly refuses `more.npz`, which spares a third file.
OVERRIDES = ['data.checks.ignore=["leakage"]']


def final_state(folder: str) -> dict[str, Any]:
    checkpoint = latest_checkpoint(Path(folder))
    assert checkpoint is not None
    saved = load_checkpoint(checkpoint)
    assert saved.meta["step"] == 12
    return {"model": saved.model, "ema": saved.ema, **saved.training}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif hasattr(a, "shape"):
        assert a.equal(b), where
    else:
        assert a == b, where


def logged(folder: str) -> list[dict[str, Any]]:
    """The run's lines, without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    machine = ("time", "speed/samples_per_second", "memory/peak_gib")
    return [{k: v for k, v in line.items() if k not in machine} for line in lines]


VARIANTS = {
    "plain": [],
    "accumulate": ["step.accumulate=2"],
    "bf16": ["step.precision=bf16"],
    "fp16": ["step.precision=fp16"],
    "sgd": ["optim.name=sgd"],
    "rmsprop": ["optim.name=rmsprop", "optim.lr=1e-3"],
    "by batch": ["data.mixing=batch"],
    "staged": ['finetune.unfreeze=[{at_step = 7, match = ["0.*", "1.*"]}]'],
    "lora": ["finetune.method=lora"],
    "8bit": ["optim.moments=8bit", "gradients.zclip={warmup_steps = 2}"],
    "bf16 moments": ["optim.moments=bf16", 'finetune.unfreeze=[{at_step = 7, match = ["0.*"]}]'],
    "penalty": ['loss.penalties=[{kind = "l2", match = ["*.weight"], weight = 1e-3}]'],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_goes_on_bitwise(
    variant: str, noisy, fastft, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*OVERRIDES, *VARIANTS[variant]]
    whole = fastft("train", str(noisy("whole")), *overrides)
    assert whole.code == 0, whole.errors
    monkeypatch.setenv("FASTFT_TEST_SIGNAL", str(int(signal.SIGTERM)))
    monkeypatch.setenv("FASTFT_TEST_CALL", "5")
    broken = fastft("train", str(noisy("broken")), *overrides)
    assert broken.code == 4
    assert "--resume goes on from there" in broken.errors
    monkeypatch.delenv("FASTFT_TEST_SIGNAL")
    resumed = fastft("train", str(noisy("broken")), *overrides, "--resume")
    assert resumed.code == 0, resumed.errors
    assert_same(final_state("whole"), final_state("broken"))
    # The mean over the steps since the last log point cannot span two processes.
    for a, b in zip(logged("whole"), logged("broken"), strict=True):
        apart = {name for name in a if a[name] != b[name]}
        assert apart <= {"train/loss"}, (a["step"], apart)


def test_kill_9_with_two_workers(noisy) -> None:
    """Real processes, killed in the middle of three steps at random; their folders say which."""
    calls = random.SystemRandom().sample(range(1, 13), 3)

    def start(folder: str, *arguments: str, kill_at: int = 0) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if kill_at:
            environment["FASTFT_TEST_SIGNAL"] = str(int(signal.SIGKILL))
            environment["FASTFT_TEST_CALL"] = str(kill_at)
        command = [sys.executable, "-m", "fastft.cli", "train", str(noisy(folder, workers=2))]
        return subprocess.Popen(
            [*command, *OVERRIDES, *arguments], env=environment, stdout=subprocess.DEVNULL
        )

    killed = {f"killed-{call}": start(f"killed-{call}", kill_at=call) for call in calls}
    assert start("whole").wait() == 0
    assert [process.wait() for process in killed.values()] == [-signal.SIGKILL] * 3
    resumed = [start(folder, "--resume") for folder in killed]
    assert [process.wait() for process in resumed] == [0, 0, 0]
    for folder in killed:
        assert_same(final_state("whole"), final_state(folder), folder)


def test_the_saved_average_loads_on_its_own(noisy, fastft) -> None:
    assert fastft("train", str(noisy("whole")), *OVERRIDES).code == 0
    checkpoint = latest_checkpoint(Path("whole"))
    assert checkpoint is not None
    model, average = (load_file(checkpoint / f"{n}.safetensors") for n in ("model", "ema"))
    assert model.keys() == average.keys()
    assert not model["0.weight"].equal(average["0.weight"])
    assert model["1.norm.running_mean"].equal(average["1.norm.running_mean"])
