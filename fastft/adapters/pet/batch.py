"""Structures of any sizes as one batch: their atoms one after another, counted in `system`.

Shapes, for B structures with N atoms and P pairs in all: `positions` [N, 3], `species` and `system`
[N], `cells` [B, 3, 3], `atoms` [B], `target` [B], `centers` and `neighbours` [P], `shifts` [P, 3],
and what `lay_out` returns; the labels `energy` [B], `forces` [N, 3] and `stress` [B, 3, 3] in
float64, NaN where there is none. `target` counts the adapter's targets; a sample's is its own field
of that name, 0 where it has none. `labels` stays on the host: the pairs (target, label) that there
are, so that no loss need ask the device.

Training batches are filled (`fill`), so that N goes up in few steps and batches share CUDA graphs:
B counts one structure more, whose atoms have no neighbours and no labels, and so change no loss and
no gradient. Batches to evaluate on are not: whoever reads their predictions finds no others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastft.adapters.pet.pairs import few, lay_out
from fastft.task import Sample

# Steps of N, powers of two, are at least this, and at least twice the root of N: the atoms of a
# number of structures drawn at random vary with that root.
_STEP = 16


def filled_size(atoms: int) -> int:
    """N for so many atoms: 16, 32, ... 64, 96, ... 256, 320, ... 1024, 1152, ... 4096, 4352, ..."""
    step = _STEP
    while step**2 < 4 * atoms:
        step *= 2
    return -(-atoms // step) * step


def collate(
    samples: Sequence[Sample], *, dtype: torch.dtype, forces: bool, stress: bool, fill: bool
) -> dict[str, Any]:
    """One batch.

    Args:
        dtype: of positions and cells.
        forces, stress: whether the batch holds these labels.
        fill: whether it is filled.
    """
    if fill:
        samples = [*samples, _filler(samples)]
    structures = [sample["structure"] for sample in samples]
    sizes = [len(structure["species"]) for structure in structures]
    found = [sample["neighbours"] for sample in samples]
    starts = np.cumsum([0, *sizes[:-1]])
    targets = [sample.get("target", 0) for sample in samples]
    batch: dict[str, Any] = {
        "positions": _joined(structures, "positions").to(dtype),
        "species": _joined(structures, "species"),
        "system": torch.from_numpy(np.repeat(np.arange(len(samples)), sizes)),
        "cells": torch.from_numpy(np.stack([s["cell"] for s in structures])).to(dtype),
        # Sums are divided by it; what fills up may have none.
        "atoms": torch.tensor(sizes).clamp(min=1),
        "target": torch.tensor(targets),
    }
    pairs = {name: _joined(found, name) for name in found[0]}
    for name in ("centers", "neighbours"):
        moved = [each[name] + start for each, start in zip(found, starts, strict=True)]
        pairs[name] = torch.from_numpy(np.concatenate(moved))
    batch |= lay_out(**{"near": None, **pairs}, atoms=sum(sizes))
    shapes: dict[str, Sequence[tuple[int, ...]]] = {"energy": [()] * len(samples)}
    if forces:
        shapes["forces"] = [(size, 3) for size in sizes]
    if stress:
        shapes["stress"] = [(3, 3)] * len(samples)
    labelled = zip(targets, samples, strict=True)
    batch["labels"] = tuple(
        sorted({(t, name) for t, s in labelled for name in shapes if name in s})
    )
    for label, each in shapes.items():
        values = [
            s.get(label, np.full(shape, np.nan)) for s, shape in zip(samples, each, strict=True)
        ]
        joined = np.concatenate(values) if label == "forces" else np.stack(values)
        batch[label] = torch.from_numpy(joined)
    return batch


def _filler(samples: Sequence[Sample]) -> Sample:
    """The structure that fills the batch up; of no atoms, where it is full."""
    species = np.concatenate([sample["structure"]["species"] for sample in samples])
    found = [sample["neighbours"] for sample in samples]
    pairs: dict[str, np.ndarray] = {}
    missing = 0
    if "near" in found[0]:
        # Cutoffs adapt to pairs without a place, whose number varies, too.
        count = sum(len(each["centers"]) for each in found)
        missing = few(count, _STEP) - count
        pairs["near"] = np.zeros(missing, bool)
    # These pairs go from atoms to themselves, so there must be one; and sums over one are slow.
    atoms = filled_size(len(species) + bool(missing)) - len(species)
    ends = np.sort(np.arange(missing) % max(atoms, 1))
    structure = {
        "species": np.resize(species[:1], atoms),
        "positions": np.zeros((atoms, 3)),
        "cell": np.eye(3),
    }
    pairs |= {"centers": ends, "neighbours": ends, "shifts": np.zeros((missing, 3), np.int64)}
    return {"structure": structure, "neighbours": pairs}


def _joined(parts: Sequence[Mapping[str, np.ndarray]], name: str) -> Tensor:
    return torch.from_numpy(np.concatenate([part[name] for part in parts]))
