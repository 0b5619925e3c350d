"""Energies of atoms and their derivatives, as one block: torch.compile sees both.

    dE/dr_n = sum over pairs ij of (d_jn - d_in) g_ij,    dE/ds_n = sum over pairs nj of v_nj g_nj

with the vectors v_ij = r_j - r_i between atoms, and g = dE/dv. What is compiled cannot be
differentiated twice, as a loss on forces must be. Here the first derivative is a part of it, so the
second is the only one. The block is upstream's backend: all names are upstream's.
"""

import contextlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from metatrain.pet import PET
from metatrain.pet.modules.backend import PETBackend
from metatrain.pet.modules.utilities import cutoff_func_bump, cutoff_func_cosine
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastft.adapters.pet.layers import use_own_layers
from fastft.adapters.pet.pairs import adaptive_settings, atom_cutoffs
from fastft.task import Batch, Block

# Energy of each atom [N], dE/dr [N, 3] and dE/ds [N, 3, 3].
Energies = tuple[Tensor, Tensor | None, Tensor | None]
_READ = ("species", "centers", "neighbours", "grid", "present", "reverse")


def make_block(model: PET) -> Block:
    """The backend, whose `forward` is `_energies` from now on, with layers of our own."""
    model.backend.forward = types.MethodType(_energies, model.backend)
    use_own_layers(model.backend)
    return Block("backend", model.backend, dynamic="first", differentiates=True, layer=False)


def energies(
    model: PET, batch: Batch, targets: tuple[str, ...], scale: Tensor, *, forces: bool, stress: bool
) -> Energies:
    """What the network says, without composition; can be backpropagated.

    Args:
        scale: of each atom's energy, `[N]`.
        forces, stress: whether derivatives are wanted.
    """
    positions, cells, system = batch["positions"], batch["cells"], batch["system"]
    centers, neighbours, shifts = (batch[name] for name in ("centers", "neighbours", "shifts"))
    # No matrix product: in TF32, atoms would be displaced.
    across = (shifts.to(cells.dtype)[:, :, None] * cells[system[centers]]).sum(1)
    vectors = (positions[neighbours] - positions[centers] + across).detach()
    inputs = {name: batch[name] for name in _READ}
    inputs |= {"target": batch["target"][system], "scale": scale.to(vectors.dtype)}
    adaptive = adaptive_settings(model)
    if not (forces or stress):
        return model.backend(vectors, inputs, targets, adaptive)
    # Evaluation runs without gradients. It takes what training compiled, too.
    again = torch.is_grad_enabled()
    with torch.enable_grad(), _differentiable_twice(model.backend):
        found = model.backend(vectors.requires_grad_(), inputs, targets, adaptive, stress=stress)
    if not again:
        found = tree_map_only(Tensor, Tensor.detach, found)
    energy, gradient, virial = found
    return energy, gradient if forces else None, virial


def _energies(
    self: PETBackend,
    vectors: Tensor,
    inputs: Mapping[str, Tensor],
    targets: tuple[str, ...],
    adaptive: Mapping[str, Any] | None,
    stress: bool = False,
) -> Energies:
    """Energies, and derivatives of their sum where the vectors require gradients.

    Args:
        vectors: of pairs, `[P, 3]`.
        inputs: fields of the batch; `target` and `scale` of each atom, `[N]`.
        adaptive: see `adaptive_settings`.
        stress: whether derivatives by strain are wanted.
    """
    data = _network_inputs(self, vectors, inputs, adaptive)
    nodes, edges = self.calculate_features(data)
    # Cells and systems count for other quantities than energies.
    made, _, _ = self.predict(nodes, edges, data, vectors, inputs["target"], list(targets))
    every = torch.cat([made[target][0] for target in targets], dim=1)
    energy = every.gather(1, inputs["target"][:, None])[:, 0] * inputs["scale"]
    if not vectors.requires_grad:
        return energy, None, None
    total = energy.sum()
    # Atoms without neighbours have energies that depend on no vector.
    (slope,) = torch.autograd.grad(total, [vectors], create_graph=True, materialize_grads=True)
    centers, neighbours = inputs["centers"], inputs["neighbours"]
    gradient = slope.new_zeros(len(energy), 3)
    gradient = gradient.index_add(0, neighbours, slope).index_add(0, centers, -slope)
    if not stress:
        return energy, gradient, None
    products = vectors.detach()[:, :, None] * slope[:, None, :]
    virial = slope.new_zeros(len(energy), 3, 3).index_add(0, centers, products)
    return energy, gradient, virial


def _network_inputs(
    backend: PETBackend,
    vectors: Tensor,
    inputs: Mapping[str, Tensor],
    adaptive: Mapping[str, Any] | None,
) -> dict[str, Tensor]:
    """What `PETBackend.calculate_features` takes, by upstream's names."""
    centers, neighbours = inputs["centers"], inputs["neighbours"]
    grid, present = inputs["grid"], inputs["present"]
    kinds = backend.get_buffer("species_to_species_index")[inputs["species"]]
    # An empty place has some length, too.
    placed = torch.where(present[..., None], vectors[grid], 1.0)
    distances = _lengths(placed)
    if adaptive is None:
        cutoffs = torch.full_like(distances, backend.cutoff)
    else:
        own = atom_cutoffs(centers, _lengths(vectors), len(kinds), **adaptive)
        cutoffs = ((own[centers] + own[neighbours]) / 2)[grid]
    bump = backend.cutoff_function.lower() == "bump"
    switch = cutoff_func_bump if bump else cutoff_func_cosine
    factors = switch(distances, cutoffs, backend.cutoff_width)
    return {
        "element_indices_nodes": kinds,
        "element_indices_neighbors": kinds[neighbours[grid]],
        "edge_vectors": placed,
        "edge_distances": distances,
        "padding_mask": present,
        "reverse_neighbor_index": inputs["reverse"],
        "cutoff_factors": torch.where(present, factors, 0.0),
    }


def _lengths(vectors: Tensor) -> Tensor:
    # Upstream's small number, for derivatives at zero.
    return (vectors.square().sum(-1) + 1e-15).sqrt()


@contextlib.contextmanager
def _differentiable_twice(backend: PETBackend) -> Iterator[None]:
    """In here, attention can be; upstream asks the training flag, which is off in evaluations and
    where most of the model is frozen."""
    mode = backend.training
    backend.training = True
    try:
        yield
    finally:
        backend.training = mode
