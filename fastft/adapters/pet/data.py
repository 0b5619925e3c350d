"""Structures from any file that ASE reads, with their neighbours.

A sample holds `structure` (`species` [N], `positions` [N, 3] and `cell` [3, 3] in angstrom, `pbc`
[3], and the number of its `target`), and those of its labels that there are: `energy`, `forces`
[N, 3] and `stress` [3, 3], all of float64. `neighbours` is added in loader workers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ase
import ase.io
import ase.neighborlist
import numpy as np
import torch
import vesin
from ase.data import chemical_symbols
from ase.stress import voigt_6_to_full_3x3_stress

from fastft.adapters.pet.options import AtomsOptions
from fastft.config import DataSource
from fastft.errors import ConfigError, DataError, nearest
from fastft.task import Sample

# What ASE moves from a file into its calculator, under these names.
_RESULTS = ("energy", "forces", "stress")


@dataclass(frozen=True, eq=False)
class Structures:
    """A data set in memory, before neighbours are looked for; `target` counts the run's."""

    samples: Sequence[Sample]
    target: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Sample:
        # A copy of the outer mapping: transforms replace fields, and no array is written to.
        return dict(self.samples[index])


def open_structures(
    source: DataSource, options: AtomsOptions, *, target: int, forces: bool, stress: bool
) -> Structures:
    """Reads a file's structures and labels.

    Args:
        target: whose labels they are.
        forces, stress: whether these labels are wanted.

    Raises:
        ConfigError: `frames` is no slice.
        DataError: the file cannot be read, a label that is wanted is in none of its structures, or
            has another shape.
    """
    where = str(source.path)
    try:
        frames = ase.io.read(where, index=options.frames)
    except Exception as error:
        if not _is_slice(options.frames):
            raise ConfigError(
                f"{where}: options.frames: must be a slice, such as ':80'; got '{options.frames}';"
                " correct it"
            ) from error
        raise DataError(
            f"{where}: must be a file that ASE reads; got {type(error).__name__}: {error}; write it"
            " as extended XYZ"
        ) from error
    frames = frames if isinstance(frames, list) else [frames]
    names = {"energy": options.energy}
    if forces:
        names["forces"] = options.forces
    if stress:
        names["stress"] = options.virial or options.stress
    problems = [
        f"{where}: {label}: must be in the file as '{name}'; got no structure that has it"
        f"{nearest(name, known_labels(frames, label))}; set options.{label}"
        + ("" if label == "energy" else f" or options.lacks, or model.options.{label} = false")
        for label, name in names.items()
        if frames and all(label_of(frame, name) is None for frame in frames)
    ]
    if problems:
        raise DataError(problems)
    samples, problems = [], []
    for index, frame in enumerate(frames):
        structure = {**_structure(index, frame), "target": target}
        sample = {"structure": structure, **_labels(frame, names, options)}
        samples.append(sample)
        shapes = {"energy": (), "forces": (len(frame), 3), "stress": (3, 3)}
        problems += [
            f"{where}: structure {index}: {label}: must have the shape {list(shapes[label])}; got"
            f" {list(sample[label].shape)}; correct the file or options.{label}"
            for label in names
            if label in sample and sample[label].shape != shapes[label]
        ]
    if problems:
        raise DataError(problems)
    return Structures(samples, target)


def with_neighbours(
    sample: Sample, *, cutoff: float, elements: Sequence[int], augment: bool
) -> Sample:
    """The sample turned at random, if asked for, and its pairs of atoms within the cutoff.

    Raises:
        DataError: it has elements that the model does not know, or a cell without volume.
    """
    structure = sample["structure"]
    unknown = sorted(set(structure["species"].tolist()) - set(elements))
    if unknown:
        raise DataError(
            "elements must be the model's,"
            f" {', '.join(chemical_symbols[number] for number in elements)}; got"
            f" {', '.join(chemical_symbols[number] for number in unknown)}; remove these"
            " structures, or take a model that knows them"
        )
    vectors = structure["cell"][structure["pbc"]]
    # Of a line or a plane its length or area.
    volume = np.sqrt(abs(np.linalg.det(vectors @ vectors.T)))
    if len(vectors) and not volume > 1e-3 * np.linalg.norm(vectors, axis=1).prod():
        raise DataError(
            "cell: must have a volume where the structure repeats; got vectors that span none;"
            " write the cell (Lattice in extended XYZ), or pbc = F F F"
        )
    if augment:
        sample = _turned(sample, _random_turn())
        structure = sample["structure"]
    centers, neighbours, shifts = _pairs(structure, cutoff)
    return {
        **sample,
        "neighbours": {"centers": centers, "neighbours": neighbours, "shifts": shifts},
    }


def _structure(index: int, frame: ase.Atoms) -> dict[str, Any]:
    pbc = np.array(frame.pbc)
    # Upstream's models see no cell vector where nothing repeats.
    cell = np.where(pbc[:, None], np.array(frame.cell), 0.0)
    numbers, positions = frame.numbers.astype(np.int64), frame.positions.astype(np.float64)
    return {
        "species": numbers,
        "positions": positions,
        "cell": cell,
        "pbc": pbc,
        # For the data checks: its place, what the file says, and a print that no turn changes.
        "index": index,
        "file_cell": np.array(frame.cell),
        "print": hashlib.blake2b(numbers.tobytes() + positions.tobytes() + cell.tobytes()).digest(),
    }


def _labels(
    frame: ase.Atoms, names: Mapping[str, str], options: AtomsOptions
) -> dict[str, np.ndarray]:
    labels = {}
    for label, name in names.items():
        value = label_of(frame, name)
        if value is None:
            continue
        array = np.asarray(value, np.float64)
        if label == "stress":
            array = _tensor(array)
            if options.virial is not None:
                volume = abs(np.linalg.det(np.array(frame.cell)))
                # No volume, no stress: the check for missing labels says so.
                array = -array / volume if volume else np.full_like(array, np.nan)
        if not np.isnan(array).all():
            labels[label] = array
    return labels


def _tensor(array: np.ndarray) -> np.ndarray:
    """A stress or virial as a matrix, from six (in Voigt's order) or nine numbers too."""
    if array.shape == (6,):
        return voigt_6_to_full_3x3_stress(array)
    return array.reshape(3, 3) if array.shape == (9,) else array


def label_of(frame: ase.Atoms, name: str) -> Any:
    """What a structure has by this name; None where it has nothing."""
    results = getattr(frame.calc, "results", {})
    for place in (results if name in _RESULTS else {}, frame.info, frame.arrays):
        if name in place:
            return place[name]
    return None


def known_labels(frames: Sequence[ase.Atoms], label: str) -> list[str]:
    """Names of what structures have in the shape of a label."""
    names = dict.fromkeys(
        name
        for frame in frames[:100]
        for place in (
            getattr(frame.calc, "results", {}),
            frame.arrays if label == "forces" else frame.info,
        )
        for name, value in place.items()
        if _may_be(label, np.asarray(value), len(frame))
    )
    return [name for name in names if name != "positions"]


def _may_be(label: str, value: np.ndarray, atoms: int) -> bool:
    shapes = {"energy": [()], "forces": [(atoms, 3)], "stress": [(6,), (9,), (3, 3)]}
    return value.dtype.kind in "fiu" and value.shape in shapes[label]


def _is_slice(text: str) -> bool:
    parts = text.split(":")
    return 2 <= len(parts) <= 3 and all(not p or p.lstrip("-").isdigit() for p in parts)


def _pairs(
    structure: Mapping[str, np.ndarray], cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both directions of every pair, and the cells between them, in upstream's order."""
    pbc = structure["pbc"]
    atoms = ase.Atoms(positions=structure["positions"], cell=structure["cell"], pbc=pbc)
    # vesin, as upstream uses it, knows no partly periodic cells.
    mixed = pbc.any() and not pbc.all()
    find: Any = ase.neighborlist.neighbor_list if mixed else vesin.ase_neighbor_list
    centers, neighbours, shifts = find("ijS", atoms, cutoff=cutoff)
    return tuple(np.asarray(a, np.int64) for a in (centers, neighbours, shifts))  # type: ignore[return-value]


def _random_turn() -> np.ndarray:
    """A matrix of O(3), uniformly at random (Mezzadri 2007, arXiv math-ph/0609050)."""
    q, r = np.linalg.qr(torch.randn(3, 3, dtype=torch.float64).numpy())
    return q * np.sign(np.diag(r))


def _turned(sample: Sample, turn: np.ndarray) -> Sample:
    structure = sample["structure"]
    turned = {
        **sample,
        "structure": {
            **structure,
            "positions": structure["positions"] @ turn.T,
            "cell": structure["cell"] @ turn.T,
            "turn": turn,
        },
    }
    if "forces" in sample:
        turned["forces"] = sample["forces"] @ turn.T
    if "stress" in sample:
        turned["stress"] = turn @ sample["stress"] @ turn.T
    return turned
