"""Energies, forces and stress of a batch, and their errors.

Forces are -dE/dr; the stress is dE/ds / volume, with the strain s applied to positions and cells.
As upstream's: energies and virials are divided by the number of atoms, forces are not, and all are
in units of the target's scale.
"""

import contextlib
from collections.abc import Iterator

import torch
from metatrain.pet import PET
from metatrain.pet.modules.backend import PETBackend
from torch import Tensor, nn
from torch.nn import functional

from fastft.adapters.pet.baseline import Baseline, type_index
from fastft.adapters.pet.options import PetOptions
from fastft.adapters.pet.pairs import network_inputs
from fastft.errors import ConfigError
from fastft.task import Batch, Loss


class PetLoss:
    """Weighted sum of the errors of energy, forces and stress; `parts` are unweighted.

    Labels that are NaN do not count. Predictions are in the target's unit and angstrom: `energy`
    [B], `forces` [N, 3], `stress` [B, 3, 3].
    """

    def __init__(self, options: PetOptions) -> None:
        self._options = options
        self._baseline = Baseline(options.target)

    def __call__(self, model: nn.Module, batch: Batch, /) -> Loss:
        """The loss; differentiable once more where gradients are on."""
        assert isinstance(model, PET)
        if torch.is_autocast_enabled(batch["positions"].device.type):
            raise ConfigError(
                "step.precision: must be 'fp32' or 'tf32', since PET is trained in full precision,"
                " as by upstream; got autocast; set it"
            )
        weights, scale = self._baseline(model)
        network, gradient, virial = self._differentiate(model, batch, scale)
        atoms = batch["atoms"]
        composition = torch.zeros_like(batch["energy"]).index_add_(
            0, batch["system"], weights[type_index(model, batch["species"])]
        )
        # Targets less composition in float64: energies can be large.
        target = (batch["energy"] - composition) / scale / atoms
        parts = {"energy": self._error(network / scale / atoms, target)}
        predictions = {"energy": network.detach().double() + composition}
        if gradient is not None:
            parts["forces"] = self._error(gradient / scale, -batch["forces"] / scale)
            predictions["forces"] = -gradient.detach()
        if virial is not None:
            a, b, c = batch["cells"].double().unbind(1)
            volume = (a * b.cross(c, dim=1)).sum(1).abs()[:, None, None]
            sizes = atoms[:, None, None]
            target = batch["stress"] * volume / scale / sizes
            parts["stress"] = self._error(virial / scale / sizes, target)
            predictions["stress"] = virial.detach() / volume
        factors = self._options.loss
        total = torch.stack([getattr(factors, n) * part for n, part in parts.items()]).sum()
        return Loss(total, {n: part.detach() for n, part in parts.items()}, predictions)

    def _differentiate(
        self, model: PET, batch: Batch, scale: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The network's energies `[B]`, and what is wanted of their derivatives by position
        `[N, 3]` and strain `[B, 3, 3]`; without composition, in the target's unit."""
        options, again = self._options, torch.is_grad_enabled()
        positions, cells, system = batch["positions"], batch["cells"], batch["system"]
        # Evaluation runs without gradients.
        with torch.enable_grad(), _twice(model.backend, again):
            positions = positions.detach().requires_grad_(options.forces)
            moved, inputs = positions, [positions] if options.forces else []
            if options.stress:
                identity = torch.eye(3, dtype=cells.dtype, device=cells.device)
                strain = identity.expand_as(cells).clone().requires_grad_()
                moved = torch.einsum("ni,nij->nj", positions, strain[system])
                cells = cells @ strain
                inputs.append(strain)
            atomic = _atomic_energies(model, options.target, moved, cells, batch)
            energy = torch.zeros(len(cells), dtype=atomic.dtype, device=atomic.device)
            energy = energy.index_add(0, system, atomic) * scale.to(atomic.dtype)
            found: list[Tensor] = []
            if inputs:
                # An atom without neighbours has an energy that depends on no position.
                found = list(
                    torch.autograd.grad(
                        energy.sum(), inputs, create_graph=again, materialize_grads=True
                    )
                )
        gradient = found.pop(0) if options.forces else None
        return energy if again else energy.detach(), gradient, found.pop() if found else None

    def _error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The mean over labels that there are, in the prediction's precision."""
        present = ~target.isnan()
        # Before anything else: a gradient would be NaN times 0.
        difference = torch.where(present, predicted - target.to(predicted.dtype), 0)
        options = self._options.loss
        if options.kind == "mse":
            total = difference.square().sum()
        elif options.kind == "mae":
            total = difference.abs().sum()
        else:
            none = torch.zeros_like(difference)
            total = functional.huber_loss(difference, none, reduction="sum", delta=options.delta)
        return total / present.sum().clamp(min=1)


def _atomic_energies(
    model: PET, target: str, positions: Tensor, cells: Tensor, batch: Batch
) -> Tensor:
    """What the network says of each atom, `[N]`, in units of the scale."""
    data = network_inputs(model, positions, cells, batch)
    nodes, edges = model.backend.calculate_features(data)
    predictions, _, _ = model.backend.predict(nodes, edges, data, cells, batch["system"], [target])
    return predictions[target][0].flatten()


@contextlib.contextmanager
def _twice(backend: PETBackend, again: bool) -> Iterator[None]:
    """In here, attention can be differentiated twice if `again`; upstream asks its training flag,
    which is off where most of the model is frozen."""
    mode = backend.training
    backend.training = again
    try:
        yield
    finally:
        backend.training = mode
