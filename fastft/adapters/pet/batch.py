"""Structures of any sizes as one batch: their atoms one after another, counted in `system`.

Shapes, for B structures with N atoms and P pairs in all: `positions` [N, 3], `species` and `system`
[N], `cells` [B, 3, 3], `atoms` [B], `target` [B], `centers` and `neighbours` [P], `shifts` [P, 3],
and what `lay_out` returns; the labels `energy` [B], `forces` [N, 3] and `stress` [B, 3, 3] in
float64, NaN where there is none. `target` counts the adapter's targets; a sample's is its own field
of that name, 0 where it has none. `labels` stays on the host: the pairs (target, label) that there
are, so that no loss need ask the device.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastft.adapters.pet.pairs import lay_out
from fastft.task import Sample


def collate(
    samples: Sequence[Sample], *, dtype: torch.dtype, forces: bool, stress: bool
) -> dict[str, Any]:
    """One batch.

    Args:
        dtype: of positions and cells.
        forces, stress: whether the batch holds these labels.
    """
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
        "atoms": torch.tensor(sizes),
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


def _joined(parts: Sequence[Mapping[str, np.ndarray]], name: str) -> Tensor:
    return torch.from_numpy(np.concatenate([part[name] for part in parts]))
