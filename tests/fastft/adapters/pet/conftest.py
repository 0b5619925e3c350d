"""A tiny PET, and structures whose energies a pair potential says."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator

from fastft.adapters.pet import PetAdapter, PetOptions
from fastft.runfile import parse
from fastft.task import Batch, Sample, Task

# Three thousand parameters.
TINY = {
    "cutoff": 3.0,
    "d_pet": 8,
    "d_head": 8,
    "d_node": 8,
    "d_feedforward": 8,
    "num_heads": 2,
    "num_attention_layers": 1,
}
OWN_ENERGIES = {1: -13.0, 6: -1030.0, 8: -2040.0}


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


def make_structure(seed: int) -> ase.Atoms:
    random = np.random.default_rng(seed)
    count = 1 + seed % 7
    grid = np.stack(np.meshgrid(*[range(2)] * 3), -1).reshape(-1, 3)[:count] * 1.4
    positions = grid + random.normal(scale=0.1, size=(count, 3))
    periodic = seed % 3 == 0
    cell = np.diag([3.1, 3.4, 3.7]) + random.normal(scale=0.1, size=(3, 3))
    numbers = random.choice([1, 6, 8], size=count)
    atoms = ase.Atoms(numbers, positions, cell=cell if periodic else None, pbc=periodic)
    atoms.calc = MorsePotential(r0=1.4, epsilon=1.0, rho0=4.0, rcut1=2.4, rcut2=2.9)
    results = {
        "energy": atoms.get_potential_energy() + sum(OWN_ENERGIES[n] for n in numbers),
        "forces": atoms.get_forces(),
    }
    # Upstream wants the stress of all structures, where it wants any.
    results["stress"] = atoms.get_stress() if periodic else np.full(6, np.nan)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def make_batch(adapter: PetAdapter, samples: Any, split: Any = "validation") -> Batch:
    made: list[Sample] = [adapter.transform(dict(s), split) for s in samples]
    return Batch(adapter.collate(made), len(made))
