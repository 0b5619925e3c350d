"""What one pass over a data set finds, for the data checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ase.data import covalent_radii

from fastft.task import Finding, Sample


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
        frames: positions, cell and forces of each structure as in the file; None without forces.
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
    frames: list[tuple[np.ndarray, np.ndarray, np.ndarray] | None] = field(default_factory=list)

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
        turn = structure.get("turn", np.eye(3))
        frame = (structure["positions"] @ turn, structure["cell"] @ turn, forces @ turn)
        self.frames.append(frame if "forces" in sample else None)
        if "stress" in sample and not structure["pbc"].all():
            self.strained.append(index)


def read_pass(name: str, split: str, samples: Any) -> Seen:
    """Reads a data set, or the part of it that checks look at."""
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


def make_finding(
    seen: Seen,
    check: str,
    name: str,
    what: str,
    found: Sequence[object],
    example: str,
    advice: str,
    severity: Literal["error", "warning"] = "warning",
) -> Finding:
    """A finding on one field of a data set."""
    return Finding(check, severity, f"{seen.where}: {name}", what, len(found), example, advice)
