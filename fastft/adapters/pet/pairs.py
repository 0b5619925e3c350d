"""Pairs of atoms on a grid of atoms by neighbours, [N, K], as PET's network reads them.

The grid's indices are made in loader workers, so that a training step reads nothing back from the
device. K goes up in few steps: what is compiled is compiled for each K, and for any number of atoms
and pairs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from metatrain.pet import PET
from metatrain.pet.modules.adaptive_cutoff import (
    get_adaptive_cutoffs_grid,
    get_adaptive_cutoffs_solver,
)
from metatrain.pet.modules.nef import (
    compute_reversed_neighbor_list,
    get_corresponding_edges,
    get_nef_indices,
)
from torch import Tensor

from fastft.task import Sample

# Of K + 1, the tokens of attention: multiples of 8 keep matrix products aligned.
_STEP = 8
# From a power of two to the next.
_SIZES = 4


def few(count: int, least: int) -> int:
    """The next of few sizes: multiples of `least` at first, then four from 2^n to 2^(n+1)."""
    octave = 1 << max(count - 1, 0).bit_length()
    step = max(least, octave // (2 * _SIZES))
    return max(1, -(-count // step)) * step


def padded_width(neighbours: int) -> int:
    """K for so many neighbours at most: 7, 15, 23, ... 63, 79, ... 127, 159, ..."""
    return few(neighbours + 1, _STEP) - 1


def lay_out(
    centers: Tensor, neighbours: Tensor, shifts: Tensor, near: Tensor | None, atoms: int
) -> dict[str, Tensor]:
    """Pairs sorted by atom, filled up to K places each.

    Args:
        centers, neighbours: `[P]`, both directions of every pair.
        shifts: cells between them, `[P, 3]`.
        near: `[P]`, which pairs get a place, the others counting for cutoffs only; None: all.
        atoms: N.

    Returns:
        `grid` [N, K], the pair at each place; `present` [N, K], whether there is one; `reverse`
        [N, K], the place of the pair's other direction in the flattened grid; and the pairs. Where
        all have a place, there is one for each place, an empty one's from its atom to itself, so
        that batches of as many atoms have the same shapes.
    """
    pairs = {"centers": centers, "neighbours": neighbours, "shifts": shifts}
    if near is None:
        return _filled(pairs, _grid(**pairs, atoms=atoms))
    if not len(centers):
        # Something to point at, that has no place.
        zero = torch.zeros(1, dtype=torch.int64)
        pairs = {"centers": zero, "neighbours": zero, "shifts": torch.zeros(1, 3).long()}
        near = torch.zeros(1, dtype=torch.bool)
    chosen = near.nonzero()[:, 0]
    laid = _grid(**{name: each[chosen] for name, each in pairs.items()}, atoms=atoms)
    # Different pairs for empty places: the backward pass of an index that repeats is slow.
    grid = torch.arange(laid["grid"].numel()).view_as(laid["grid"]) % len(near)
    grid[laid["present"]] = chosen[laid["grid"][laid["present"]]]
    return {**pairs, **laid, "grid": grid}


def _grid(centers: Tensor, neighbours: Tensor, shifts: Tensor, atoms: int) -> dict[str, Tensor]:
    counts = torch.bincount(centers, minlength=atoms)
    width = padded_width(int(counts.max()) if atoms else 0)
    places = torch.arange(atoms * width).view(atoms, width)
    if not len(centers):
        none = torch.zeros_like(places, dtype=torch.bool)
        return {"grid": torch.zeros_like(places), "present": none, "reverse": places}
    grid, columns, present = get_nef_indices(centers, counts, width)
    others = get_corresponding_edges(centers, neighbours, shifts)
    column = compute_reversed_neighbor_list(grid, others, columns, present)
    # Empty places are their own, so that each place is named once.
    reverse = torch.where(present, neighbours[grid] * width + column, places)
    return {"grid": grid, "present": present, "reverse": reverse}


def _filled(pairs: dict[str, Tensor], laid: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pair for each place, in their order."""
    grid, present = laid["grid"], laid["present"]
    own = torch.arange(len(grid))[:, None].expand_as(grid)
    neighbours, shifts = own.clone(), pairs["shifts"].new_zeros(*grid.shape, 3)
    neighbours[present] = pairs["neighbours"][grid[present]]
    shifts[present] = pairs["shifts"][grid[present]]
    return {
        **laid,
        "grid": torch.arange(grid.numel()).view_as(grid),
        "centers": own.flatten(),
        "neighbours": neighbours.flatten(),
        "shifts": shifts.flatten(0, 1),
    }


def with_near_pairs(sample: Sample, adaptive: Mapping[str, Any]) -> Sample:
    """The sample with `near` beside its pairs: which are within the cutoffs of their atoms.

    Args:
        adaptive: see `adaptive_settings`.
    """
    structure, pairs = sample["structure"], sample["neighbours"]
    positions, centers, neighbours = structure["positions"], pairs["centers"], pairs["neighbours"]
    near = np.zeros(0, dtype=bool)
    if len(centers):
        vectors = positions[neighbours] - positions[centers] + pairs["shifts"] @ structure["cell"]
        distances = torch.from_numpy(np.linalg.norm(vectors, axis=1))
        atoms = len(structure["species"])
        cutoffs = atom_cutoffs(torch.from_numpy(centers), distances, atoms, **adaptive).numpy()
        near = distances.numpy() <= (cutoffs[centers] + cutoffs[neighbours]) / 2
    return {**sample, "neighbours": {**pairs, "near": near}}


def atom_cutoffs(
    centers: Tensor,
    distances: Tensor,
    atoms: int,
    *,
    method: str,
    neighbours: float,
    cutoff: float,
    width: float,
) -> Tensor:
    """Each atom's cutoff, `[N]`, by upstream's `method`."""
    solver = method.lower() == "solver"
    find = get_adaptive_cutoffs_solver if solver else get_adaptive_cutoffs_grid
    return find(centers, distances, neighbours, atoms, cutoff, cutoff_width=width)


def adaptive_settings(model: PET) -> dict[str, Any] | None:
    """What `atom_cutoffs` takes; None where cutoffs do not adapt to the number of neighbours."""
    backend = model.backend
    if backend.num_neighbors_adaptive is None:
        return None
    return {
        "method": backend.adaptive_cutoff_method,
        "neighbours": backend.num_neighbors_adaptive,
        "cutoff": backend.cutoff,
        "width": model.cutoff_width_adaptive,
    }
