"""Energies, forces and stress of a batch, and their errors.

Forces are -dE/dr; the stress is dE/ds / volume, with the strain s applied to positions and cells.
As upstream's: energies and virials are divided by the number of atoms, forces are not, and all are
in units of the target's scale.
"""

import contextlib
from collections.abc import Iterator, Sequence

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

    Every structure belongs to the target that `batch["target"]` [B] counts, and is predicted by its
    heads. Errors are means over a target's own labels; with several, their losses add up, and parts
    are named 'energy/pbe0:forces'.

    Labels that are NaN do not count. Predictions are in each target's unit and angstrom: `energy`
    [B], `forces` [N, 3], `stress` [B, 3, 3].

    Args:
        targets: their names, as `batch["target"]` counts them.
    """

    def __init__(self, options: PetOptions, targets: Sequence[str]) -> None:
        self._options = options
        self._targets = list(targets)
        self._baselines = [Baseline(target) for target in targets]

    def __call__(self, model: nn.Module, batch: Batch, /) -> Loss:
        """The loss; differentiable once more where gradients are on."""
        assert isinstance(model, PET)
        if torch.is_autocast_enabled(batch["positions"].device.type):
            raise ConfigError(
                "step.precision: must be 'fp32' or 'tf32', since PET is trained in full precision,"
                " as by upstream; got autocast; set it"
            )
        atoms, system = batch["atoms"], batch["system"]
        own, scale = self._baseline(model, batch)
        network, gradient, virial = self._differentiate(model, batch, scale)
        composition = torch.zeros_like(batch["energy"]).index_add_(0, system, own)
        # Targets less composition in float64: energies can be large. Predictions keep theirs.
        wide, scale = scale, scale.to(network.dtype)
        target = (batch["energy"] - composition) / wide / atoms
        errors = {"energy": (network / scale / atoms, target)}
        predictions = {"energy": network.detach().double() + composition}
        if gradient is not None:
            per_atom = system[:, None]
            errors["forces"] = (gradient / scale[per_atom], -batch["forces"] / wide[per_atom])
            predictions["forces"] = -gradient.detach()
        if virial is not None:
            a, b, c = batch["cells"].double().unbind(1)
            volume = (a * b.cross(c, dim=1)).sum(1).abs()[:, None, None]
            scale, wide, sizes = (each[:, None, None] for each in (scale, wide, atoms))
            target = batch["stress"] * volume / wide / sizes
            errors["stress"] = (virial / scale / sizes, target)
            predictions["stress"] = virial.detach() / volume
        parts, factors = {}, []
        for index, name in enumerate(self._targets):
            chosen = batch["target"] == index
            of = {"energy": chosen, "forces": chosen[system, None], "stress": chosen[:, None, None]}
            for part, pair in errors.items():
                label = part if len(self._targets) == 1 else f"{name}:{part}"
                parts[label] = self._error(*pair, of[part])
                factors.append(getattr(self._options.loss, part))
        weighted = [factor * part for factor, part in zip(factors, parts.values(), strict=True)]
        total = torch.stack(weighted).sum()
        return Loss(total, {n: part.detach() for n, part in parts.items()}, predictions)

    def _baseline(self, model: PET, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each atom's energy alone `[N]`, and each structure's scale `[B]`; float64."""
        target, system = batch["target"], batch["system"]
        found = [baseline(model) for baseline in self._baselines]
        weights, scales = (torch.stack(values) for values in zip(*found, strict=True))
        return weights[target[system], type_index(model, batch["species"])], scales[target]

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
            atomic = _atomic_energies(model, self._targets, moved, cells, batch)
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

    def _error(self, predicted: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
        """The mean over those labels that are chosen and there, in the prediction's precision."""
        present = ~target.isnan() & chosen
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
    model: PET, targets: list[str], positions: Tensor, cells: Tensor, batch: Batch
) -> Tensor:
    """What each atom's target says of it, `[N]`, in units of the scale."""
    data = network_inputs(model, positions, cells, batch)
    nodes, edges = model.backend.calculate_features(data)
    system = batch["system"]
    predictions, _, _ = model.backend.predict(nodes, edges, data, cells, system, targets)
    every = torch.cat([predictions[target][0] for target in targets], dim=1)
    return every.gather(1, batch["target"][system, None])[:, 0]


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
