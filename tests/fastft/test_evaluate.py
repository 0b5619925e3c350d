"""Which checkpoint is evaluated, and what of it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastft import evaluate
from fastft.checkpoint import latest_checkpoint
from fastft.loop import score

pytestmark = pytest.mark.usefixtures("project")

FALLBACK = "no checkpoint has a finite 'loss': the latest stands in for the best"


def test_the_latest_stands_in_for_the_best(fastft: Callable[..., Any]) -> None:
    assert fastft("train", "run.toml", "data.validation=[]").code == 0
    outcome = fastft("evaluate", "run.toml")
    assert (outcome.code, outcome.errors) == (0, "")
    assert outcome.output.splitlines()[0] == FALLBACK
    for checkpoint in ("latest", "run/checkpoints/step-00000002"):
        assert FALLBACK not in fastft("evaluate", "run.toml", "--checkpoint", checkpoint).output


def test_only_the_weights_are_read(fastft: Callable[..., Any]) -> None:
    assert fastft("train", "run.toml", "ema.decay=0.5").code == 0
    assert FALLBACK not in fastft("evaluate", "run.toml").output
    checkpoint = latest_checkpoint(Path("run"))
    assert checkpoint is not None
    for name in ("training.pt", "model.safetensors"):
        damage(checkpoint / name)
    assert fastft("evaluate", "run.toml").code == 0
    damage(checkpoint / "ema.safetensors")
    outcome = fastft("evaluate", "run.toml")
    assert outcome.code == 2
    assert "ema.safetensors: must be as it was saved; got other content" in outcome.errors


@pytest.mark.parametrize("deterministic", [False, True])
def test_algorithms_are_those_of_training(
    fastft: Callable[..., Any], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = f"run.deterministic={str(deterministic).lower()}"
    assert fastft("train", "run.toml", setting).code == 0
    seen = []

    def noted(*arguments: Any) -> dict[str, float]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return score(*arguments)

    monkeypatch.setattr(evaluate, "score", noted)
    assert fastft("evaluate", "run.toml", setting).code == 0
    assert seen == [deterministic]
    assert not torch.are_deterministic_algorithms_enabled()


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
