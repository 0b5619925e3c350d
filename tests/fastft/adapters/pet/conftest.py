"""A tiny PET, and structures whose energies a pair potential says."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import pytest
import tomli_w
import torch
from small_pet import TINY, make_structure

from fastft.adapters.pet import PetAdapter, PetOptions
from fastft.runfile import parse
from fastft.task import Task


@pytest.fixture
def make_adapter() -> Callable[..., PetAdapter]:
    """An adapter of the tiny model, or, with `elements = []`, of a checkpoint's."""

    def make(**options: Any) -> PetAdapter:
        options["hypers"] = {**TINY, **options.pop("hypers", {})}
        tree = {"elements": ["H", "C", "O"], **options}
        if not tree["elements"]:
            tree.pop("hypers")
        return PetAdapter(parse(PetOptions, tree, key="model.options"))

    return make


@pytest.fixture
def build() -> Callable[..., Task]:
    def make(adapter: PetAdapter, checkpoint: Path | None = None) -> Task:
        torch.manual_seed(0)
        return adapter.build(
            None, device=torch.device("cpu"), checkpoint=checkpoint, pretrained=True
        )

    return make


@pytest.fixture
def structures() -> list[ase.Atoms]:
    """Twelve of one to seven atoms, every third periodic, with energies, forces and stress."""
    return [make_structure(seed) for seed in range(12)]


@pytest.fixture
def atoms_file(tmp_path: Path, structures: list[ase.Atoms]) -> Path:
    path = tmp_path / "atoms.xyz"
    ase.io.write(path, structures, format="extxyz")
    return path


@pytest.fixture
def pet_run(project: Path, make_adapter: Any, structures: Any) -> str:
    """A run file of four steps over twelve structures, in the current folder."""
    ase.io.write("atoms.xyz", structures, format="extxyz")
    tree = {
        "run": {"folder": "run", "steps": 4, "device": "cpu"},
        "model": {
            "adapter": "pet",
            "options": {
                "elements": ["H", "C", "O"],
                "stress": True,
                "hypers": make_adapter().options.hypers,
            },
        },
        "data": {
            "train": [{"path": "atoms.xyz", "options": {"frames": ":9"}, "name": "train"}],
            "validation": [{"path": "atoms.xyz", "options": {"frames": "9:"}, "name": "held out"}],
            "batch_size": 4,
            "checks": {"ignore": ["missing"]},
        },
        "optim": {"name": "adam", "lr": 0.01},
        "log": {"every_steps": 1},
        "evaluate": {"metrics": [{"name": "mae", "prediction": "forces", "target": "forces"}]},
    }
    Path("pet.toml").write_text(tomli_w.dumps(tree))
    return "pet.toml"


@pytest.fixture
def ethanol() -> Path:
    folder = os.environ.get("FASTFT_DATA")
    path = Path(folder or "", "atoms", "ethanol_reduced_100.xyz")
    if not folder or not path.is_file():
        pytest.skip("needs real molecules: FASTFT_DATA is not set, or has no atoms")
    return path
