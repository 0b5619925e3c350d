"""Data checks: silent on good structures, and precise about bad ones."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.build
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from fastft.adapters.pet.baseline import fit_baseline
from fastft.config import ChecksConfig, DataSource
from fastft.data.checks import run_checks
from fastft.data.sources import open_source
from fastft.task import Finding


@pytest.fixture
def find(make_adapter: Any, build: Any, tmp_path: Path) -> Callable[..., list[Finding]]:
    """What the adapter's checks find in structures."""

    def run(frames: list[ase.Atoms], most: int = 1000, **options: Any) -> list[Finding]:
        ase.io.write(tmp_path / "data.xyz", frames, format="extxyz")
        adapter = make_adapter(**{"elements": ["H", "C", "O", "Cu"], **options})
        task = build(adapter)
        source = open_source(adapter, DataSource(path=tmp_path / "data.xyz", name="data"), "train")
        own = {check.__name__.replace("_", "-") for check in adapter.checks}
        config = ChecksConfig(max_samples=most)
        found = run_checks([source], adapter.checks, task.fields, config)
        return [finding for finding in found if finding.check in own]

    return run


def molecules(count: int = 40) -> list[ase.Atoms]:
    """Water and methane, shaken, with all-electron energies in eV."""
    random = np.random.default_rng(0)
    made = []
    for index in range(count):
        atoms = ase.build.molecule(("H2O", "CH4")[index % 2])
        atoms.rattle(0.02, seed=index)
        forces = random.normal(size=(len(atoms), 3))
        own = {1: -13.6, 6: -1030.0, 8: -2040.0}
        energy = sum(own[n] for n in atoms.numbers) + random.normal(scale=0.1)
        label(atoms, energy, forces - forces.mean(0))
        made.append(atoms)
    return made


def label(atoms: ase.Atoms, energy: float, forces: np.ndarray, **more: Any) -> None:
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, **more)


def test_good_structures_give_no_finding(find: Any) -> None:
    crystals = []
    for seed in range(3):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        label(atoms, -15.0 - seed, np.zeros((4, 3)), stress=np.ones(6))
        crystals.append(atoms)
    assert find([*molecules(), *crystals]) == []


@pytest.mark.parametrize(
    ("factor", "unit", "said"),
    [(23.06, "eV", "as of kcal/mol"), (1.0, "Hartree", "as of ev"), (96.5, "eV", "as of kj/mol")],
)
def test_energies_of_another_unit(find: Any, factor: float, unit: str, said: str) -> None:
    frames = molecules()
    for atoms in frames:
        label(atoms, factor * atoms.get_potential_energy(), atoms.get_forces())
    (finding,) = find(frames, unit=unit)
    assert finding.check == "energy-units"
    assert said in finding.what
    assert f"must be in {unit}" in finding.what


@pytest.mark.parametrize(("factor", "said"), [(1 / 0.529, "as in bohr"), (0.1, "as in nanometres")])
def test_lengths_of_another_unit(find: Any, factor: float, said: str) -> None:
    frames = molecules()
    for atoms in frames:
        atoms.positions *= factor
    found = {finding.check: finding for finding in find(frames)}
    assert said in found["length-units"].what


def one_energy_off(frames: list[ase.Atoms]) -> None:
    label(frames[5], frames[5].get_potential_energy() + 100, frames[5].get_forces())


def pushed(frames: list[ase.Atoms]) -> None:
    label(frames[5], frames[5].get_potential_energy(), frames[5].get_forces() + 1)


def too_close(frames: list[ase.Atoms]) -> None:
    moved = frames[5]
    energy, forces = moved.get_potential_energy(), moved.get_forces()
    moved.positions[1] = moved.positions[0] + [0.3, 0, 0]
    label(moved, energy, forces)


def broken(frames: list[ase.Atoms]) -> None:
    moved = frames[5]
    energy, forces = moved.get_potential_energy(), moved.get_forces()
    moved.positions[1] += 20
    label(moved, energy, forces)


def unused_cell(frames: list[ase.Atoms]) -> None:
    frames[5].cell = np.eye(3) * 10


def copied(frames: list[ase.Atoms]) -> None:
    frames.append(frames[5])


def copied_with_another_energy(frames: list[ase.Atoms]) -> None:
    frames.append(frames[5].copy())
    label(frames[-1], frames[5].get_potential_energy() + 0.5, frames[5].get_forces())


@pytest.mark.parametrize(
    ("spoil", "check", "severity", "example"),
    [
        (one_energy_off, "energy-outliers", "warning", "structure 5: -9"),
        (pushed, "net-forces", "warning", "structure 5: a sum of"),
        (too_close, "overlapping-atoms", "warning", "structure 5: 0."),
        (broken, "isolated-atoms", "warning", "structure 5: 1 atoms"),
        (unused_cell, "cells", "warning", "structure 5"),
        (copied, "duplicate-structures", "warning", "structure 5 and structure 40"),
        (
            copied_with_another_energy,
            "duplicate-structures",
            "error",
            "structure 5 and structure 40",
        ),
    ],
)
def test_bad_structures(
    find: Any, spoil: Callable[..., None], check: str, severity: str, example: str
) -> None:
    frames = molecules()
    spoil(frames)
    (finding,) = find(frames)
    assert (finding.check, finding.severity) == (check, severity)
    assert finding.where.startswith("data (train): ")
    assert finding.example.startswith(example)


def moved(frames: list[ase.Atoms], factor: float = 1.0, sign: float = 1.0) -> list[ase.Atoms]:
    """A molecule in a harmonic well, moved at random by little; `factor` is of its energies."""
    random = np.random.default_rng(1)
    made = []
    for _ in range(20):
        atoms = frames[0].copy()
        move = random.normal(scale=0.02, size=(len(atoms), 3))
        atoms.positions += move
        energy = -76 * 27.2 + 20 * (move**2).sum()
        label(atoms, factor * energy, -sign * 40 * move)
        made.append(atoms)
    return made


def test_some_energies_of_another_unit(find: Any) -> None:
    frames = molecules()
    for atoms in frames[4:8]:
        label(atoms, atoms.get_potential_energy() / 27.2114, atoms.get_forces())
    found = {finding.check: finding for finding in find(frames)}
    finding = found["mixed-units"]
    assert finding.count == 4
    assert "energies are 0.03675 times those of others" in finding.what
    assert "hartree and ev" in finding.what
    assert finding.example.startswith("structure 4: ")


@pytest.mark.parametrize(
    ("factor", "sign", "said"),
    [
        (1.0, 1.0, None),
        (1.0, -1.0, "have the other sign"),
        (23.06, 1.0, "are 0.04337 times as large, as of kcal/mol and ev"),
        (1 / 27.2114, 1.0, "are 27.21 times as large, as of hartree and ev"),
        (51.42, 1.0, "are 0.01945 times as large, as of"),
    ],
)
def test_forces_that_do_not_go_with_energies(
    find: Any, factor: float, sign: float, said: str | None
) -> None:
    names = {23.06: "kcal/mol", 1 / 27.2114: "Hartree"}
    found = find(moved(molecules(), factor, sign), unit=names.get(factor, "eV"))
    found = [finding for finding in found if finding.check == "forces-and-energies"]
    assert [said in finding.what for finding in found] == ([True] if said else [])


def test_reference_energies_that_moved(make_adapter: Any, build: Any, tmp_path: Path) -> None:
    frames = molecules()
    ase.io.write(tmp_path / "old.xyz", frames, format="extxyz")
    for atoms in frames:
        label(atoms, atoms.get_potential_energy() + 5.0 * len(atoms), atoms.get_forces())
    ase.io.write(tmp_path / "new.xyz", frames, format="extxyz")
    adapter = make_adapter()
    task = build(adapter)
    old = open_source(adapter, DataSource(path=tmp_path / "old.xyz", name="old"), "train")
    fit_baseline(task.model, "energy", old.raw.samples)  # type: ignore[attr-defined]
    adapter.save(task, tmp_path / "old.ckpt")
    for fit, name, count in (("new", "new", 1), ("new", "old", 0), ("always", "new", 0)):
        adapter = make_adapter(elements=[], fit=fit)
        task = build(adapter, tmp_path / "old.ckpt")
        source = open_source(adapter, DataSource(path=tmp_path / f"{name}.xyz"), "train")
        found = run_checks([source], adapter.checks, task.fields, ChecksConfig())
        found = [finding for finding in found if finding.check == "reference-energies"]
        assert len(found) == count
        for finding in found:
            (shift,) = re.findall(r"got ([\d.]+) per atom from them", finding.what)
            assert float(shift) == pytest.approx(5, abs=0.1)


def test_stress_of_a_molecule(find: Any) -> None:
    frames = molecules()
    label(frames[5], frames[5].get_potential_energy(), frames[5].get_forces(), stress=np.ones(6))
    (finding,) = find(frames, stress=True)
    assert (finding.check, finding.severity) == ("cells", "error")
    assert "only structures that are periodic in all directions have one" in finding.what


def test_a_part_that_is_read_is_named_by_its_place(find: Any) -> None:
    frames = molecules()
    too_close(frames)
    frames[4:6] = frames[5], frames[4]
    (finding,) = find(frames, most=20)
    assert finding.example.startswith("structure 4: ")
