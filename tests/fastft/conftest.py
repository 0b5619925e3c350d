"""A tiny project: data, a user's model and a run file, in the folder that a test runs in."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from fastft_kernels.device import interpret_on_cpu

from fastft.cli import main

MODEL = """\
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def build(width=8, classes=3):
    return Net(width, classes)
"""

RUN = """\
[run]
folder = "run"
steps = 2
device = "cpu"

[model]
adapter = "python"

[model.options]
file = "model.py"

[data]
batch_size = 8
train = [{ path = "train.npz" }]
validation = [{ path = "validation.npz" }]

[[loss.terms]]
name = "cross_entropy"

[optim]
lr = 1e-2

[log]
tensorboard = false
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, what it printed, and its errors line by line."""

    code: int
    output: str
    errors: str

    @property
    def problems(self) -> list[str]:
        """The errors, without the program's name before each."""
        return self.errors.removeprefix("fastft: ").rstrip("\n").split("\nfastft: ")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: run.toml, model.py, train.npz (40 samples), validation.npz (16)."""
    monkeypatch.chdir(tmp_path)
    # A user's file adds its folder.
    monkeypatch.setattr(sys, "path", list(sys.path))
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 16)):
        write_samples(Path(f"{split}.npz"), random.normal(size=(count, 4)))
    Path("model.py").write_text(MODEL)
    Path("run.toml").write_text(RUN)
    return tmp_path


def write_samples(path: Path, inputs: np.ndarray) -> None:
    """Labelled by the largest of the first three values."""
    np.savez(path, inputs=inputs.astype(np.float32), targets=inputs[:, :3].argmax(1))


@pytest.fixture
def fastft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(params=["plain torch", "interpreter"])
def kernel_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways in which fastft's kernels compute on a CPU, one after the other."""
    interpreted = request.param == "interpreter"
    if interpreted and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    interpret_on_cpu(interpreted)
    yield
    interpret_on_cpu(False)
