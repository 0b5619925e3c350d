"""A tiny PET, and structures whose energies a pair potential says."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import pytest
import torch
from small_pet import TINY, make_structure

from fastft.adapters.pet import PetAdapter, PetOptions
from fastft.runfile import parse
from fastft.task import Batch, Sample, Task


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
def ethanol() -> Path:
    folder = os.environ.get("FASTFT_DATA")
    path = Path(folder or "", "atoms", "ethanol_reduced_100.xyz")
    if not folder or not path.is_file():
        pytest.skip("needs real molecules: FASTFT_DATA is not set, or has no atoms")
    return path


def make_batch(adapter: PetAdapter, samples: Any, split: Any = "validation") -> Batch:
    made: list[Sample] = [adapter.transform(dict(s), split) for s in samples]
    return Batch(adapter.collate(made), len(made))
