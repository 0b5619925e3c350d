"""Data checks for atoms: units by magnitude, labels, cells, distances, duplicates.

All look at one pass over the samples, which `atoms_checks` shares between them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ase import units
from ase.data import covalent_radii

from fastft.task import CheckData, DataCheck, Finding, Sample

# Distances to the nearest atom, over the sum of both covalent radii: below, atoms overlap; a median
# beyond is another unit of length.
OVERLAP = 0.5
USUAL = (0.6, 1.5)
# Energies per atom farther from the composition's fit than so many robust standard deviations.
FAR = 20.0
# Forces' sum over the root of the sum of their squares.
NET_FORCE = 0.02
# All-electron energies of neutral atoms are near -0.5 Z^2.39 hartree, within a few percent up to
# lanthanides; no energy of a structure lies far below their sum.
_DEEPEST = 1.5
_EV = {
    "ev": 1.0,
    "mev": 1e-3,
    "hartree": units.Hartree,
    "kcal/mol": units.kcal / units.mol,
    "kj/mol": units.kJ / units.mol,
    "rydberg": units.Rydberg,
}


@dataclass
class Seen:
    """What one pass over a data set found.

    Attributes:
        where: data set and split.
        target: whose energies these are, as the adapter counts its targets.
        indices: of the structures in the data set; all else here goes by the order of reading.
        species: of each structure.
        energies: NaN where there is none.
        nearest: of each structure, its shortest distance over the sum of covalent radii; NaN where
            no two atoms are neighbours.
        alone: atoms without neighbours.
        net: length of the sum of forces over the root of the sum of their squares.
        prints: hash of a structure's own coordinates -> structures.
        unused: structures with cell vectors along which they do not repeat.
        strained: structures with a stress that do not repeat in all directions.
    """

    where: str
    target: int = 0
    indices: list[int] = field(default_factory=list)
    species: list[np.ndarray] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    nearest: list[float] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)
    net: list[float] = field(default_factory=list)
    prints: dict[bytes, list[int]] = field(default_factory=dict)
    unused: list[int] = field(default_factory=list)
    strained: list[int] = field(default_factory=list)

    def name(self, number: int) -> str:
        """The structure that was read as this one, by its place in the data set."""
        return f"structure {self.indices[number]}"

    def add(self, sample: Sample) -> None:
        """Takes a sample in."""
        structure = sample["structure"]
        index = len(self.species)
        self.target = structure["target"]
        self.indices.append(structure["index"])
        self.species.append(structure["species"])
        self.energies.append(float(sample.get("energy", np.nan)))
        self.nearest.append(_nearest(sample))
        counts = np.bincount(sample["neighbours"]["centers"], minlength=len(structure["species"]))
        self.alone.append(int((counts == 0).sum()))
        forces = sample.get("forces", np.zeros((1, 3)))
        size = np.linalg.norm(forces)
        self.net.append(float(np.linalg.norm(forces.sum(0)) / size) if size else 0.0)
        self.prints.setdefault(structure["print"], []).append(index)
        if structure["file_cell"][~structure["pbc"]].any():
            self.unused.append(index)
        if "stress" in sample and not structure["pbc"].all():
            self.strained.append(index)


def atoms_checks(units_of: Mapping[str, str]) -> Sequence[DataCheck]:
    """The checks.

    Args:
        units_of: of energies, by target; filled when the model is built.
    """
    # Data sets are read once for all checks: the core gives each the same object.
    kept: list[tuple[CheckData, list[Seen]]] = []

    def look(data: CheckData) -> list[Seen]:
        if not kept or kept[0][0] is not data:
            kept[:] = [(data, [_pass(name, split, s) for name, split, s in data.sources])]
        return kept[0][1]

    def named(check: Callable[..., Iterator[Finding]], *more: Any) -> DataCheck:
        @functools.wraps(check)
        def run(data: CheckData) -> Iterator[Finding]:
            for seen in look(data):
                yield from check(seen, *more)

        return run

    return (
        named(energy_units, units_of),
        named(length_units),
        named(energy_outliers),
        named(net_forces),
        named(overlapping_atoms),
        named(isolated_atoms),
        named(cells),
        named(duplicate_structures),
    )


def energy_units(seen: Seen, units_of: Mapping[str, str]) -> Iterator[Finding]:
    """Energies below those of all electrons of the atoms: another unit than the target's."""
    unit = list(units_of.values())[seen.target]
    factor = _EV.get(unit.lower())
    if factor is None or not seen.species:
        return
    deepest = np.array(
        [units.Hartree * 0.5 * (z.astype(float) ** 2.39).sum() for z in seen.species]
    )
    ratios = -np.array(seen.energies) * factor / deepest
    if not (ratio := np.nanmedian(ratios) if np.isfinite(ratios).any() else 0.0) > _DEEPEST:
        return
    # Of total energies, it says by which factor the unit is wrong.
    likely = min(_EV, key=lambda name: abs(np.log(ratio / (factor / _EV[name]))))
    close = abs(np.log(ratio * _EV[likely] / factor)) < 0.1
    guess = f", as of {likely}" if close and likely != unit.lower() else ""
    index = int(np.nanargmax(ratios))
    yield _finding(
        seen,
        "energy-units",
        "energy",
        f"must be in {unit}; got {ratio:.3g} times the energy of all electrons of the atoms{guess}",
        [index],
        f"{seen.name(index)}: {seen.energies[index]:.6g}",
        "set model.options.unit, or convert energies, forces and stress",
    )


def length_units(seen: Seen) -> Iterator[Finding]:
    """Distances that are no bonds' in angstrom."""
    found = np.array(seen.nearest)
    if not np.isfinite(found).any():
        return
    middle = float(np.nanmedian(found))
    if USUAL[0] <= middle <= USUAL[1]:
        return
    guess = ", as in bohr" if 1.6 < middle < 2.3 else ", as in nanometres" if middle < 0.2 else ""
    yield _finding(
        seen,
        "length-units",
        "positions",
        "must be in angstrom; got nearest atoms"
        f" {middle:.2g} times as far apart as bonds are{guess}",
        list(range(len(found))),
        seen.name(int(np.nanargmin(np.abs(found - middle)))),
        "convert positions, cells and forces",
    )


def energy_outliers(seen: Seen) -> Iterator[Finding]:
    """Energies per atom far from what composition says."""
    energies = np.array(seen.energies)
    kept = np.flatnonzero(np.isfinite(energies))
    kinds = np.unique(np.concatenate(seen.species)) if seen.species else np.zeros(0, int)
    if len(kept) < 3 * len(kinds) + 5:
        return
    counts = np.array([[(seen.species[i] == kind).sum() for kind in kinds] for i in kept], float)
    atoms = counts.sum(1)
    weights = np.ones(len(kept), bool)
    left, spread = np.zeros(len(kept)), 0.0
    # Twice: the first fit is bent by what it looks for.
    for _ in range(2):
        fit = np.linalg.lstsq(counts[weights], energies[kept][weights], rcond=None)[0]
        left = (energies[kept] - counts @ fit) / atoms
        spread = 1.4826 * np.median(np.abs(left - np.median(left)))
        weights = np.abs(left - np.median(left)) <= FAR * spread
    # Without a spread, composition says all.
    far = kept[~weights] if spread > 0 else kept[:0]
    if len(far):
        worst = int(kept[np.argmax(np.abs(left - np.median(left)))])
        yield _finding(
            seen,
            "energy-outliers",
            "energy",
            f"energies per atom must be near what composition says; got {len(far)} farther than"
            f" {FAR:g} standard deviations ({spread:.3g})",
            list(far),
            f"{seen.name(worst)}: {energies[worst]:.6g}",
            "look for calculations that did not converge, or of another method",
        )


def net_forces(seen: Seen) -> Iterator[Finding]:
    """Forces that do not sum to zero, which those of a potential do."""
    found = [index for index, net in enumerate(seen.net) if net > NET_FORCE]
    if found:
        worst = int(np.argmax(seen.net))
        yield _finding(
            seen,
            "net-forces",
            "forces",
            f"must sum to zero; got {len(found)} structures where they do not",
            found,
            f"{seen.name(worst)}: a sum of {seen.net[worst]:.1%} of all forces' norm",
            "look for fixed atoms, external fields and forces of another frame",
        )


def overlapping_atoms(seen: Seen) -> Iterator[Finding]:
    """Atoms much closer than a bond."""
    found = [index for index, near in enumerate(seen.nearest) if near < OVERLAP]
    if found:
        worst = int(np.nanargmin(seen.nearest))
        yield _finding(
            seen,
            "overlapping-atoms",
            "positions",
            f"atoms must be apart by {OVERLAP:g} of a bond; got {len(found)} structures with"
            " closer ones",
            found,
            f"{seen.name(worst)}: {seen.nearest[worst]:.2g} of a bond",
            "look at it; a cell that is too small gives such distances too",
        )


def isolated_atoms(seen: Seen) -> Iterator[Finding]:
    """Atoms beyond the cutoff of all others, in structures of several."""
    found = [index for index, n in enumerate(seen.alone) if n and len(seen.species[index]) > 1]
    if found:
        worst = int(np.argmax(seen.alone))
        yield _finding(
            seen,
            "isolated-atoms",
            "positions",
            "atoms should have neighbours within the cutoff; got"
            f" {len(found)} structures with some that have none",
            found,
            f"{seen.name(worst)}: {seen.alone[worst]} atoms",
            "the model sees no force on them; look for broken molecules, or a cell without pbc",
        )


def cells(seen: Seen) -> Iterator[Finding]:
    """Stress of what does not repeat, and cells that do not."""
    if seen.strained:
        yield _finding(
            seen,
            "cells",
            "stress",
            "only structures that are periodic in all directions have one; got"
            f" {len(seen.strained)} others",
            seen.strained,
            seen.name(seen.strained[0]),
            "remove it there, or set pbc",
            "error",
        )
    if seen.unused:
        yield _finding(
            seen,
            "cells",
            "pbc",
            "a cell counts only where the structure repeats; got"
            f" {len(seen.unused)} structures with cell vectors that do not",
            seen.unused,
            seen.name(seen.unused[0]),
            "set pbc to T where it repeats",
        )


def duplicate_structures(seen: Seen) -> Iterator[Finding]:
    """The same coordinates twice, which is an error where the energies differ."""
    repeated = [indices for indices in seen.prints.values() if len(indices) > 1]
    energies = np.array(seen.energies)
    torn = [i for i in repeated if np.ptp(energies[i]) > 1e-6 * max(1.0, np.abs(energies[i]).max())]
    if torn:
        yield _finding(
            seen,
            "duplicate-structures",
            "structures",
            f"the same structure must have one energy; got {len(torn)} with several",
            torn,
            f"{seen.name(torn[0][0])} and {seen.name(torn[0][1])}",
            "keep the right ones",
            "error",
        )
    if same := [i for i in repeated if i not in torn]:
        yield _finding(
            seen,
            "duplicate-structures",
            "structures",
            f"each structure should be there once; got {len(same)} that are there more often",
            same,
            f"{seen.name(same[0][0])} and {seen.name(same[0][1])}",
            "remove copies, which weigh more than others",
        )


def _pass(name: str, split: str, samples: Any) -> Seen:
    seen = Seen(f"{name} ({split})")
    for sample in samples:
        seen.add(sample)
    return seen


def _nearest(sample: Sample) -> float:
    """The shortest distance between neighbours over the sum of their covalent radii."""
    structure, pairs = sample["structure"], sample["neighbours"]
    if not len(pairs["centers"]):
        return np.nan
    positions, radii = structure["positions"], covalent_radii[structure["species"]]
    first, second = pairs["centers"], pairs["neighbours"]
    vectors = positions[second] - positions[first] + pairs["shifts"] @ structure["cell"]
    return float((np.linalg.norm(vectors, axis=1) / (radii[first] + radii[second])).min())


def _finding(
    seen: Seen,
    check: str,
    name: str,
    what: str,
    found: Sequence[object],
    example: str,
    advice: str,
    severity: Literal["error", "warning"] = "warning",
) -> Finding:
    return Finding(check, severity, f"{seen.where}: {name}", what, len(found), example, advice)
