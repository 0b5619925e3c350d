"""What a user can get wrong, and the one message that says so.

Every case starts from the good project of `conftest.py`, breaks one thing and runs one command. The
tables are in `tests/tables`.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import CHECKPOINT, DATA, OTHER_COMMANDS, WHERE
from bad_settings import LOSS, MODEL, RUN_FILE, TRAINED_PARAMETERS
from cases import Case, pickle_code, save_with_code

CASES = [
    *RUN_FILE,
    *MODEL,
    *TRAINED_PARAMETERS,
    *LOSS,
    *DATA,
    *CHECKPOINT,
    *WHERE,
    *OTHER_COMMANDS,
]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("wrong", CASES, ids=lambda wrong: wrong.what)
def test_bad_input(
    wrong: Case, fastft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if wrong.before is not None:
        wrong.before()
    files = read_files()
    outcome = fastft(*wrong.command.split())
    assert outcome.code == 2
    assert "Traceback" not in outcome.errors
    assert len(outcome.problems) == len(wrong.problems), outcome.errors
    for found, expected in zip(outcome.problems, wrong.problems, strict=True):
        assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), found), found
    assert not Path("code-was-run").exists()
    if wrong.begun:
        assert not list(Path("run").rglob("*.safetensors"))
    else:
        assert read_files() == files


def read_files() -> dict[Path, bytes]:
    """Everything in the project but what Python caches."""
    files = (file for file in Path().rglob("*") if file.is_file())
    return {file: file.read_bytes() for file in files if "__pycache__" not in file.parts}


@pytest.mark.usefixtures("project")
def test_the_good_project_trains(fastft: Callable[..., Any]) -> None:
    outcome = fastft("train", "run.toml")
    assert (outcome.code, outcome.errors) == (0, "")
    assert Path("run/checkpoints/step-00000002/model.safetensors").is_file()


@pytest.mark.usefixtures("project")
def test_the_malicious_files_are_malicious() -> None:
    pickle_code()
    with Path("weights.pt").open("rb") as file:
        pickle.load(file)
    assert Path("code-was-run").is_dir()
    Path("code-was-run").rmdir()
    save_with_code()
    torch.load("weights.pt", weights_only=False)
    assert Path("code-was-run").is_dir()
