"""What ends a run from outside reaches its loader workers as well."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastft.checkpoint import latest_checkpoint, load_checkpoint

# The signal goes to all processes of the run, as from SLURM, timeout, systemd or a terminal.
# Another process sends it: torch's workers take one from their parent for the order to end.
MODEL = """\
import os
import subprocess

from torch import nn
from torch.nn import functional

steps = 0


def build():
    return nn.Linear(4, 3), loss


def loss(model, batch):
    global steps
    steps += model.training
    if model.training and steps == 3:
        number = os.environ["FASTFT_TEST_SIGNAL"]
        subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgid(0)}"])
    return functional.cross_entropy(model(batch["inputs"]), batch["targets"])
"""

SETTINGS = (
    "run.steps=1000",
    "loss={}",
    "model.options={file='stop.py'}",
    "data.batch_size=4",
    "data.workers=2",
    "log.every_steps=1",
)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_the_step(number: signal.Signals) -> None:
    Path("stop.py").write_text(MODEL)
    process = subprocess.run(
        [sys.executable, "-m", "fastft.cli", "train", "run.toml", *SETTINGS],
        env={**os.environ, "FASTFT_TEST_SIGNAL": str(int(number))},
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert process.returncode == 4, process.stderr
    assert process.stderr == (
        f"fastft: {number.name}: stopped after step 3 of 1000 and saved it; the same command with"
        " --resume goes on from there\n"
    )
    checkpoint = latest_checkpoint(Path("run"))
    assert checkpoint is not None
    assert load_checkpoint(checkpoint).meta["step"] == 3
