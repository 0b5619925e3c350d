"""Data checks for atoms: units by magnitude, labels, cells, distances, duplicates.

All look at one pass over the samples, which `atoms_checks` shares between them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastft.adapters.pet.seen import Seen, make_finding, read_pass
from fastft.adapters.pet.unit_checks import (
    Reference,
    energy_units,
    forces_and_energies,
    length_units,
    mixed_units,
    reference_energies,
)
from fastft.task import CheckData, DataCheck, Finding

# Distances to the nearest atom, over the sum of both covalent radii: below, atoms overlap.
OVERLAP = 0.5
# Energies per atom farther from the composition's fit than so many robust standard deviations.
FAR = 20.0
# Forces' sum over the root of the sum of their squares.
NET_FORCE = 0.02


def atoms_checks(
    units_of: Mapping[str, str], reference_of: Callable[[int], Reference | None]
) -> Sequence[DataCheck]:
    """The checks.

    Args:
        units_of: of energies, by target; filled when the model is built.
        reference_of: what the model takes for energies of atoms alone, for a target's number; None
            where that is fitted to the data.
    """
    # Data sets are read once for all checks: the core gives each the same object.
    kept: list[tuple[CheckData, list[Seen]]] = []

    def look(data: CheckData) -> list[Seen]:
        if not kept or kept[0][0] is not data:
            kept[:] = [(data, [read_pass(name, split, s) for name, split, s in data.sources])]
        return kept[0][1]

    def named(check: Callable[..., Iterator[Finding]], *more: Any) -> DataCheck:
        @functools.wraps(check)
        def run(data: CheckData) -> Iterator[Finding]:
            for seen in look(data):
                yield from check(seen, *more)

        return run

    def across(check: Callable[[Sequence[Seen]], Iterator[Finding]]) -> DataCheck:
        """A check of all data sets of a target together."""

        @functools.wraps(check)
        def run(data: CheckData) -> Iterator[Finding]:
            found = look(data)
            for target in sorted({seen.target for seen in found}):
                yield from check([seen for seen in found if seen.target == target])

        return run

    return (
        named(energy_units, units_of),
        across(mixed_units),
        named(forces_and_energies),
        named(reference_energies, reference_of),
        named(length_units),
        named(energy_outliers),
        named(net_forces),
        named(overlapping_atoms),
        named(isolated_atoms),
        named(cells),
        named(duplicate_structures),
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
        yield make_finding(
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
        yield make_finding(
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
        yield make_finding(
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
        yield make_finding(
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
        yield make_finding(
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
        yield make_finding(
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
        yield make_finding(
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
        yield make_finding(
            seen,
            "duplicate-structures",
            "structures",
            f"each structure should be there once; got {len(same)} that are there more often",
            same,
            f"{seen.name(same[0][0])} and {seen.name(same[0][1])}",
            "remove copies, which weigh more than others",
        )
