"""What PET's network reads of a batch: pairs of atoms on a grid of atoms by neighbours, [N, K].

The grid's indices are made in loader workers, so that a training step reads nothing back from the
device. Where cutoffs adapt to the number of neighbours, which pairs count depends on the distances:
then upstream's own function makes the grid, on the device, and waits for it.
"""

from typing import cast

import torch
from metatrain.pet import PET
from metatrain.pet.modules.nef import (
    compute_reversed_neighbor_list,
    get_corresponding_edges,
    get_nef_indices,
)
from metatrain.pet.modules.utilities import cutoff_func_bump, cutoff_func_cosine
from torch import Tensor

from fastft.task import Batch


def make_grid(centers: Tensor, neighbours: Tensor, shifts: Tensor, atoms: int) -> dict[str, Tensor]:
    """Pairs sorted by atom, filled up to the largest number of neighbours K.

    Args:
        centers, neighbours: `[P]`, both directions of every pair.
        shifts: cells between them, `[P, 3]`.
        atoms: N.

    Returns:
        `grid` [N, K], the pair at each place; `present` [N, K], whether there is one; `reverse`
        [N, K], the place of the pair's other direction in the flattened grid.
    """
    counts = torch.bincount(centers, minlength=atoms)
    width = int(counts.max()) if atoms else 0
    grid, places, present = get_nef_indices(centers, counts, width)
    others = get_corresponding_edges(centers, neighbours, shifts)
    column = compute_reversed_neighbor_list(grid, others, places, present)
    # Empty places point at different ones: the backward pass of an index that repeats is slow.
    empty = (~present).flatten().cumsum(0).view_as(present) - 1
    reverse = torch.where(present, neighbours[grid] * width + column, empty)
    return {"grid": grid, "present": present, "reverse": reverse}


def network_inputs(model: PET, positions: Tensor, cells: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What `PETBackend.calculate_features` takes, by upstream's names.

    Args:
        positions, cells: of the batch, as far as energies are differentiated by them.
    """
    centers, neighbours, shifts = (batch[name] for name in ("centers", "neighbours", "shifts"))
    species, system = batch["species"], batch["system"]
    if model.num_neighbors_adaptive is not None:
        return model.backend.preprocess(
            positions,
            centers,
            neighbours,
            species,
            cells,
            shifts,
            system,
            model.cutoff_width_adaptive,
        )
    kinds = cast(Tensor, model.backend.species_to_species_index)[species]
    across = torch.einsum("pi,pij->pj", shifts.to(cells.dtype), cells[system[centers]])
    vectors = positions[neighbours] - positions[centers] + across
    # Upstream's small numbers, for derivatives at a distance of zero: in empty places there is one.
    distances = vectors.norm(dim=-1) + 1e-15
    bump = model.cutoff_function.lower() == "bump"
    switch = cutoff_func_bump if bump else cutoff_func_cosine
    factors = switch(distances, torch.full_like(distances, model.cutoff), model.cutoff_width)
    grid, present = batch["grid"], batch["present"]
    vectors = vectors[grid]
    return {
        "element_indices_nodes": kinds,
        "element_indices_neighbors": kinds[neighbours][grid],
        "edge_vectors": vectors,
        "edge_distances": (vectors.square().sum(2) + 1e-15).sqrt(),
        "padding_mask": present,
        "reverse_neighbor_index": batch["reverse"],
        "cutoff_factors": torch.where(present, factors[grid], 0.0),
    }
