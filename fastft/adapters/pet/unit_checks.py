"""Data checks of units and references, by magnitude."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase import units

from fastft.adapters.pet.seen import Seen, make_finding
from fastft.task import Finding

# Medians of distances to the nearest atom, over the sum of both covalent radii, that are bonds'.
USUAL = (0.6, 1.5)
# All-electron energies of neutral atoms are near -0.5 Z^2.39 hartree, within a few percent up to
# lanthanides; no energy of a structure lies far below their sum.
_DEEPEST = 1.5
EV = {
    "ev": 1.0,
    "mev": 1e-3,
    "hartree": units.Hartree,
    "kcal/mol": units.kcal / units.mol,
    "kj/mol": units.kJ / units.mol,
    "rydberg": units.Rydberg,
}
# Energies per atom of one composition differ by less than this factor, and units by more.
_ONE_UNIT = 1.5
# Distances from a target's reference energies, in its scale, that training would have to learn.
_MOVED = 10.0
# Atoms move by less from one structure to the next where forces say how energies change, in
# angstrom.
_SMALL_MOVE = 0.3


@dataclass(frozen=True)
class Reference:
    """A target's composition energies by atomic number, and its scale."""

    energies: Mapping[int, float]
    scale: float


def energy_units(seen: Seen, units_of: Mapping[str, str]) -> Iterator[Finding]:
    """Energies below those of all electrons of the atoms: another unit than the target's."""
    unit = list(units_of.values())[seen.target]
    factor = EV.get(unit.lower())
    if factor is None or not seen.species:
        return
    deepest = np.array(
        [units.Hartree * 0.5 * (z.astype(float) ** 2.39).sum() for z in seen.species]
    )
    ratios = -np.array(seen.energies) * factor / deepest
    if not (ratio := np.nanmedian(ratios) if np.isfinite(ratios).any() else 0.0) > _DEEPEST:
        return
    # Of total energies, it says by which factor the unit is wrong.
    likely = min(EV, key=lambda name: abs(np.log(ratio / (factor / EV[name]))))
    close = abs(np.log(ratio * EV[likely] / factor)) < 0.1
    guess = f", as of {likely}" if close and likely != unit.lower() else ""
    index = int(np.nanargmax(ratios))
    yield make_finding(
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
    yield make_finding(
        seen,
        "length-units",
        "positions",
        "must be in angstrom; got nearest atoms"
        f" {middle:.2g} times as far apart as bonds are{guess}",
        list(range(len(found))),
        seen.name(int(np.nanargmin(np.abs(found - middle)))),
        "convert positions, cells and forces",
    )


def mixed_units(data_sets: Sequence[Seen]) -> Iterator[Finding]:
    """Structures of one composition whose energies per atom are apart by the factor of two units.

    Total energies of a composition are close to each other; where energies are relative, so that
    they are not, nothing is found.
    """
    groups: dict[tuple[tuple[int, int], ...], list[tuple[Seen, int, float]]] = {}
    for seen in data_sets:
        for index, (species, energy) in enumerate(zip(seen.species, seen.energies, strict=True)):
            if np.isfinite(energy) and energy:
                kinds, counts = np.unique(species, return_counts=True)
                counts = counts // np.gcd.reduce(counts)
                key = tuple(zip(kinds.tolist(), counts.tolist(), strict=True))
                groups.setdefault(key, []).append((seen, index, energy / len(species)))
    odd: dict[int, list[tuple[int, float]]] = {}
    for members in groups.values():
        values = np.array([value for *_, value in members])
        logs = np.log(np.abs(values))
        order = np.argsort(logs)
        parts = np.split(order, np.flatnonzero(np.diff(logs[order]) > math.log(_ONE_UNIT)) + 1)
        tight = all(np.ptp(logs[part]) < math.log(_ONE_UNIT) for part in parts)
        if len(parts) < 2 or not tight or len(set(np.sign(values))) > 1:
            continue
        usual = max(parts, key=len)
        for part in parts:
            ratio = float(np.exp(np.median(logs[part]) - np.median(logs[usual])))
            if part is not usual and _units_apart(ratio) is not None:
                for member in part:
                    seen, index, _ = members[member]
                    odd.setdefault(id(seen), []).append((index, ratio))
    for seen in data_sets:
        if found := sorted(odd.get(id(seen), [])):
            index, ratio = found[0]
            yield make_finding(
                seen,
                "mixed-units",
                "energy",
                f"must be in one unit; got {len(found)} structures whose energies are {ratio:.4g}"
                f" times those of others of the same composition, as of {_units_apart(ratio)}",
                [index for index, _ in found],
                f"{seen.name(index)}: {seen.energies[index]:.6g}",
                "convert them, with their forces and stress",
            )


def forces_and_energies(seen: Seen) -> Iterator[Finding]:
    """Forces that do not say how energies change from one structure to the next like it.

    Between two structures with small moves x, energies change by -F x, with the mean of both F.
    """
    ratios = _energies_over_work(seen)
    if len(ratios) < 5:
        return
    middle = float(np.median(ratios))
    if not np.median(np.abs(ratios - middle)) < 0.2 * abs(middle):
        return
    if abs(middle + 1) < 0.2:
        guess, advice = "have the other sign", "write minus the gradient of the energy"
    elif middle > 0 and (names := _units_apart(middle, 1.0, units.Bohr)) is not None:
        guess = f"are {1 / middle:.4g} times as large, as of {names}"
        advice = "bring both to one unit, and lengths to angstrom"
    else:
        return
    yield make_finding(
        seen,
        "forces-and-energies",
        "forces",
        f"must be minus the gradient of the energies; those of {len(ratios)} pairs of structures"
        f" {guess}",
        range(len(ratios)),
        f"the change of the energy is {middle:.4g} times the work of the forces",
        advice,
    )


def reference_energies(
    seen: Seen, reference_of: Callable[[int], Reference | None]
) -> Iterator[Finding]:
    """Energies far from the composition energies of a target that keeps those it has."""
    reference = reference_of(seen.target)
    if reference is None or not np.isfinite(seen.energies).any():
        return
    left = np.array(
        [
            (energy - sum(reference.energies[int(number)] for number in species)) / len(species)
            for species, energy in zip(seen.species, seen.energies, strict=True)
        ]
    )
    middle = float(np.nanmedian(left))
    if abs(middle) > _MOVED * reference.scale:
        index = int(np.nanargmin(np.abs(left - middle)))
        yield make_finding(
            seen,
            "reference-energies",
            "energy",
            "must be near the composition energies of the target in the checkpoint; got"
            f" {middle:.4g} per atom from them, {abs(middle) / reference.scale:.3g} of its scales",
            range(len(left)),
            f"{seen.name(index)}: {seen.energies[index]:.6g}",
            "they are of another method: name a new target, or set model.options.fit = 'always'",
        )


def _energies_over_work(seen: Seen) -> np.ndarray:
    """Changes of the energy over the work of the forces, of pairs that are alike."""
    last: dict[bytes, int] = {}
    changes, works = [], []
    for index, (species, frame) in enumerate(zip(seen.species, seen.frames, strict=True)):
        before = last.get(species.tobytes())
        last[species.tobytes()] = index
        other = None if before is None else seen.frames[before]
        if frame is None or other is None or before is None:
            continue
        move = frame[0] - other[0]
        if np.abs(move).max() < _SMALL_MOVE and np.allclose(frame[1], other[1]):
            changes.append(seen.energies[index] - seen.energies[before])
            works.append(-((frame[2] + other[2]) / 2 * move).sum())
    change, work = np.array(changes), np.array(works)
    if not len(work) or not work.any():
        return np.zeros(0)
    # Small works say little.
    kept = np.isfinite(change) & (np.abs(work) > 0.3 * np.median(np.abs(work)))
    return change[kept] / work[kept]


def _units_apart(ratio: float, *lengths: float) -> str | None:
    """The two units whose factor this is, as 'hartree and ev'; None where there are none.

    Args:
        lengths: factors that may come with it, as of a force per bohr.
    """
    found = [
        (abs(math.log(ratio * EV[one] / EV[other] * length)), f"{one} and {other}", length)
        for one in EV
        for other in EV
        for length in lengths or (1.0,)
        if one != other or length != 1
    ]
    # Not 1, which is no mistake.
    distance, names, length = min(found)
    if distance > 0.05 or abs(math.log(ratio)) < math.log(_ONE_UNIT):
        return None
    return names if length == 1 else f"{names}, and per bohr"
