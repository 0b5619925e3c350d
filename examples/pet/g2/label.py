"""Small molecules, shaken, with energies and forces of two levels of theory, as extended XYZ.

The molecules are those of ASE's g2 collection (Curtiss et al. 1997) that are made of hydrogen,
carbon, nitrogen and oxygen, have three atoms or more, and no unpaired electron. The old level is
GFN1-xTB (Grimme et al. 2017), the new one GFN2-xTB (Bannwarth et al. 2019), both by the package
tblite. Molecules are held out, not structures: a sixth of them is in no training data, another
sixth only in the old level's.

Writes into `runs/g2/data`, in seconds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.collections import g2

ELEMENTS = {"H", "C", "N", "O"}
# Of every coordinate, in angstrom.
SHAKE = 0.04
# Copies of each molecule, for the old level and to hold out; structures of the new level in all.
OLD, HELD_OUT, NEW = 48, 8, 512


def molecules() -> list[ase.Atoms]:
    """The 58 molecules, by name in `info`."""
    found = []
    for name in g2.names:
        atoms = g2[name]
        closed = sum(atoms.numbers) % 2 == 0 and not atoms.get_initial_magnetic_moments().any()
        if closed and len(atoms) >= 3 and set(atoms.symbols) <= ELEMENTS:
            found.append(ase.Atoms(atoms.numbers, atoms.positions, info={"name": name}))
    return found


def shaken(molecule: ase.Atoms, random: np.random.Generator) -> ase.Atoms:
    """A copy with normal noise on every coordinate."""
    atoms = molecule.copy()
    atoms.positions += random.normal(scale=SHAKE, size=(len(atoms), 3))
    return atoms


def labelled(structures: Sequence[ase.Atoms], calculator: Calculator) -> list[ase.Atoms]:
    """Copies that hold energies in eV and forces in eV per angstrom."""
    done = []
    for structure in structures:
        atoms = structure.copy()
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        done.append(atoms)
    return done


def write_data(folder: Path, old: Calculator, new: Calculator, seed: int = 0) -> None:
    """Six files of extended XYZ.

    `old.xyz` has many structures of the molecules that the old level knows, `new.xyz` some of those
    that the new level knows, at random: its first ones are a small data set. `held-out.xyz` has
    molecules that only the old level knows, `unseen.xyz` molecules that neither does, by the new
    level; with `-old` in their names, the same structures by the old one.
    """
    random = np.random.default_rng(seed)
    found = molecules()
    sixth = len(found) // 6
    order = [found[i] for i in random.permutation(len(found))]
    unseen, held_out, both = order[:sixth], order[sixth : 2 * sixth], order[2 * sixth :]

    def copies(of: Sequence[ase.Atoms], count: int) -> list[ase.Atoms]:
        return [shaken(molecule, random) for molecule in of for _ in range(count)]

    files: dict[str, tuple[list[ase.Atoms], Calculator]] = {
        "old": (copies([*held_out, *both], OLD), old),
        "new": ([shaken(both[i], random) for i in random.integers(len(both), size=NEW)], new),
        "held-out": (copies(held_out, HELD_OUT), new),
        "unseen": (copies(unseen, HELD_OUT), new),
    }
    for name in ("held-out", "unseen"):
        files[f"{name}-old"] = files[name][0], old
    folder.mkdir(parents=True, exist_ok=True)
    for name, (structures, calculator) in files.items():
        ase.io.write(folder / f"{name}.xyz", labelled(structures, calculator), format="extxyz")


def main(folder: Path) -> None:
    # Only here, so that other calculators do without it.
    try:
        from tblite.ase import TBLite  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit("label.py: needs tblite, which is not installed; run: pip install tblite==0.8.0")

    old, new = (TBLite(method=method, verbosity=0) for method in ("GFN1-xTB", "GFN2-xTB"))
    write_data(folder, old, new)


if __name__ == "__main__":
    main(Path("runs/g2/data"))
