"""Rows of a table of mistakes, and what breaks the good project of `conftest.py`."""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from fastft.cli import main


@dataclass(frozen=True)
class Case:
    """One thing that is wrong.

    Attributes:
        what: the case's name.
        command: what is typed after `fastft`.
        problems: every message, whole; '...' stands for anything.
        before: breaks a file first.
        begun: whether training has begun, so that the run folder may hold logs.
    """

    what: str
    command: str
    problems: tuple[str, ...]
    before: Callable[[], object] | None
    begun: bool


def case(
    what: str,
    command: str,
    *problems: str,
    before: Callable[[], object] | None = None,
    begun: bool = False,
) -> Case:
    return Case(what, command, problems, before, begun)


def replace(file: str, old: str, new: str) -> Callable[[], object]:
    def change() -> None:
        text = Path(file).read_text()
        assert old in text
        Path(file).write_text(text.replace(old, new))

    return change


def append(file: str, text: str) -> Callable[[], object]:
    return lambda: Path(file).write_text(Path(file).read_text() + text)


def write(file: str, content: bytes) -> Callable[[], object]:
    return lambda: Path(file).write_bytes(content)


def truncate(file: str) -> Callable[[], object]:
    def change() -> None:
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[: len(content) // 2])

    return change


def arrays(**changed: np.ndarray | None) -> Callable[[], object]:
    """Rewrites train.npz with other arrays, or without one."""

    def change() -> None:
        found = {**np.load("train.npz"), **changed}
        np.savez("train.npz", **{name: a for name, a in found.items() if a is not None})

    return change


def value(name: str, sample: int, wrong: float) -> Callable[[], object]:
    """Rewrites train.npz with one wrong value."""

    def change() -> None:
        found = dict(np.load("train.npz"))
        found[name][sample] = wrong
        np.savez("train.npz", **found)

    return change


def weights(*, prefix: str = "", classes: int = 3) -> Callable[[], object]:
    """Writes weights.safetensors for the project's model."""

    def change() -> None:
        shapes = {
            "stem.weight": (8, 4),
            "stem.bias": (8,),
            "blocks.0.linear.weight": (8, 8),
            "blocks.0.linear.bias": (8,),
            "blocks.1.linear.weight": (8, 8),
            "blocks.1.linear.bias": (8,),
            "head.weight": (classes, 8),
            "head.bias": (classes,),
        }
        tensors = {prefix + name: torch.ones(shape) for name, shape in shapes.items()}
        safetensors.torch.save_file(tensors, "weights.safetensors")

    return change


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("code-was-run",)


def save_with_code() -> None:
    torch.save({"stem.weight": torch.ones(8, 4), "hook": Malicious()}, "weights.pt")


def pickle_code() -> None:
    Path("weights.pt").write_bytes(pickle.dumps(Malicious()))


def train() -> None:
    assert main(["train", "run.toml"]) == 0


def each(*changes: Callable[[], object]) -> Callable[[], object]:
    return lambda: [change() for change in changes]


TRAIN = "train run.toml"
PRETRAINED = "train run.toml model.checkpoint=weights.safetensors"
TIMM = "train run.toml model.adapter=timm model.options="
ONE_BLOCK = replace("model.py", "Block(width), Block(width)", "Block(width)")
THREE_CLASSES = append(
    "model.py",
    "\n\nfrom fastft.task import FieldSpec\nfields = {'targets': FieldSpec(classes=3)}\n",
)
NAMES = ", ".join(
    f"'{name}'"
    for name in (
        "stem.weight",
        "stem.bias",
        "blocks.0.linear.weight",
        "blocks.0.linear.bias",
        "blocks.1.linear.weight",
        "blocks.1.linear.bias",
        "head.weight",
        "head.bias",
    )
)
