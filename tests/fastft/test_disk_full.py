"""A full disk is one error that says so, whatever was being written."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastft.errors import CheckpointError
from fastft.runfile import read_run_file
from fastft.runtime import write_record


def train(*settings: str, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """Trains where the system refuses to write more than `largest_file` bytes into any file."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [sys.executable, "-m", "fastft.cli", "train", "run.toml", *settings],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("largest_file", "refused"),
    [(0, "run.toml"), (6000, "checkpoints/step-00000001"), (50_000, "metrics.jsonl")],
)
def test_a_run_that_fills_the_disk(largest_file: int, refused: str) -> None:
    settings = ("log.every_steps=1", "log.tensorboard=true", "checkpoint.every_steps=1")
    process = train(*settings, "run.steps=500", largest_file=largest_file)
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"fastft: run/{refused}: must be written whole; got File too large")


@pytest.mark.usefixtures("project")
def test_a_record_that_cannot_be_written_leaves_the_earlier_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, config = Path("run"), read_run_file(Path("run.toml"))
    folder.mkdir()
    device = torch.device("cpu")
    write_record(folder, config, device)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"run.toml", "environment.json"}

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"run\.toml: must be written whole; got No space"):
        write_record(folder, config, device)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("project")
def test_what_a_run_began_with_is_kept(
    fastft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastft.runtime.platform.platform", lambda: "first machine")
    assert fastft("train", "run.toml").code == 0
    monkeypatch.setattr("fastft.runtime.platform.platform", lambda: "second machine")
    assert fastft("train", "run.toml", "--resume", "run.steps=3").code == 0
    starts = json.loads(Path("run/environment.json").read_text())
    assert [start["platform"] for start in starts] == ["first machine", "second machine"]
    assert all("started" in start for start in starts)
