"""Energies, forces and stress of a batch, and their errors.

Forces are -dE/dr; the stress is dE/ds / volume, with the strain s applied to positions and cells.
As upstream's: energies and virials are divided by the number of atoms, forces are not, and all are
in units of the target's scale.
"""

from collections.abc import Sequence

import torch
from metatrain.pet import PET
from torch import Tensor, nn
from torch.nn import functional

from fastft.adapters.pet.baseline import Baseline, type_index
from fastft.adapters.pet.energy import energies
from fastft.adapters.pet.options import PetOptions
from fastft.errors import ConfigError
from fastft.task import Batch, Loss


class PetLoss:
    """Weighted sum of the errors of energy, forces and stress; `parts` are unweighted.

    Every structure belongs to the target that `batch["target"]` [B] counts, and is predicted by its
    heads. Errors are means over a target's own labels; with several targets, their losses add up,
    as upstream's of one batch, and parts are named 'energy/pbe0:forces'.

    Labels that are NaN do not count; parts that a batch has no labels for are left out. Predictions
    are in each target's unit and angstrom: `energy` [B], `forces` [N, 3], `stress` [B, 3, 3].

    Args:
        targets: their names, as `batch["target"]` counts them.
        mixed: whether training batches hold several, so that they add up in evaluation, too, where
            each batch holds one.
    """

    def __init__(self, options: PetOptions, targets: Sequence[str], *, mixed: bool = True) -> None:
        self._options = options
        self._targets = tuple(targets)
        self._adds_up = mixed and len(self._targets) > 1
        self._baselines = [Baseline(target) for target in targets]

    def __call__(self, model: nn.Module, batch: Batch, /) -> Loss:
        """The loss; can be backpropagated where gradients are on."""
        assert isinstance(model, PET)
        if torch.is_autocast_enabled(batch["positions"].device.type):
            raise ConfigError(
                "step.precision: must be 'fp32' or 'tf32', since PET is trained in full precision,"
                " as by upstream; got autocast; set it"
            )
        options, atoms, system = self._options, batch["atoms"], batch["system"]
        own, scale = self._baseline(model, batch)
        wanted = {"forces": options.forces, "stress": options.stress}
        network, gradient, virial = energies(model, batch, self._targets, scale[system], **wanted)
        network, composition = (_by_structure(values, batch) for values in (network, own))
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
            virial = _by_structure(virial, batch)
            a, b, c = batch["cells"].double().unbind(1)
            volume = (a * b.cross(c, dim=1)).sum(1).abs()[:, None, None]
            scale, wide, sizes = (each[:, None, None] for each in (scale, wide, atoms))
            target = batch["stress"] * volume / wide / sizes
            errors["stress"] = (virial / scale / sizes, target)
            predictions["stress"] = virial.detach() / volume
        target = batch["target"]
        of = {"energy": target, "forces": target[system, None], "stress": target[:, None, None]}
        parts, weighted = {}, []
        for index, part in batch["labels"]:
            name = part if len(self._targets) == 1 else f"{self._targets[index]}:{part}"
            parts[name] = self._error(*errors[part], of[part] == index)
            weighted.append(getattr(options.loss, part) * parts[name])
        # Without labels nothing is learnt.
        total = torch.stack(weighted).sum() if weighted else 0 * network.sum()
        held = {index for index, _ in batch["labels"]}
        term = self._targets[held.pop()] if self._adds_up and len(held) == 1 else ""
        return Loss(total, {n: part.detach() for n, part in parts.items()}, predictions, term)

    def _baseline(self, model: PET, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each atom's energy alone `[N]`, and each structure's scale `[B]`; float64."""
        target, system = batch["target"], batch["system"]
        found = [baseline(model) for baseline in self._baselines]
        weights, scales = (torch.stack(values) for values in zip(*found, strict=True))
        return weights[target[system], type_index(model, batch["species"])], scales[target]

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


def _by_structure(values: Tensor, batch: Batch) -> Tensor:
    """Sums over the atoms of each structure, `[N, ...]` -> `[B, ...]`."""
    zeros = values.new_zeros(len(batch["atoms"]), *values.shape[1:])
    return zeros.index_add(0, batch["system"], values)
