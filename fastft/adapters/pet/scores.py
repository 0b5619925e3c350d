"""Errors of energies, forces and stress, by target, name and unit."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastft.adapters.pet.targets import ENERGY
from fastft.task import Batch

# Name -> what its unit is per.
_PER = {
    "energy": "atom",
    "forces": "angstrom",
    "virial": "atom",
    "stress": "cubic_angstrom",
}


class PetScores:
    """Mean absolute and root-mean-square errors of each target, by upstream's names and units.

    'energy_mae_mev_per_atom' and 'forces_mae_mev_per_angstrom' of the target 'energy';
    'energy/pbe0_mae_...' and 'forces[energy/pbe0]_mae_...' of another. Energies and virials are per
    atom; forces, virials and stress count by component. Of a target in eV they are in meV, as
    upstream's tables, else in its own unit. What has no label in the data is left out.

    Args:
        units: of the energies, by target, as `batch["target"]` counts them.
    """

    def __init__(self, units: Mapping[str, str]) -> None:
        self._units = dict(units)
        # Name -> for each target its sums of errors, of their squares, and of labels: [targets, 3].
        self._sums: dict[str, Tensor] = {}

    def update(self, predictions: Mapping[str, Tensor], batch: Batch, /) -> None:
        """Adds a batch."""
        for name, error, target in _errors(predictions, batch):
            there = ~error.isnan()
            error = torch.where(there, error, 0)
            each = torch.stack([error.abs(), error.square(), there.double()], -1)
            each = each.reshape(len(target), -1, 3).sum(1)
            sums = each.new_zeros(len(self._units), 3).index_add_(0, target, each)
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def compute(self) -> Mapping[str, float]:
        """The errors so far."""
        sums = {name: each.tolist() for name, each in self._sums.items()}
        values = {}
        for index, (target, unit) in enumerate(self._units.items()):
            ev = unit.lower() == "ev"
            factor = 1e3 if ev else 1.0
            plain = "mev" if ev else re.sub(r"\W+", "_", unit.lower()).strip("_")
            for name, each in sums.items():
                absolute, square, count = each[index]
                if count:
                    start, end = _external(name, target), f"{plain}_per_{_PER[name]}"
                    values[f"{start}_mae_{end}"] = factor * absolute / count
                    values[f"{start}_rmse_{end}"] = factor * (square / count) ** 0.5
        return values

    def reset(self) -> None:
        """Forgets all batches."""
        self._sums = {}


def _errors(
    predictions: Mapping[str, Tensor], batch: Batch
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names, errors with one row per atom or structure, and the rows' targets."""
    target, atoms = batch["target"], batch["atoms"]
    for name, predicted in predictions.items():
        error = predicted.double() - batch[name]
        match name:
            case "energy":
                yield name, error / atoms, target
            case "forces":
                yield name, error, target[batch["system"]]
            case _:
                volume = torch.linalg.det(batch["cells"].double()).abs()
                yield "virial", error * (volume / atoms)[:, None, None], target
                yield name, error, target


def _external(name: str, target: str) -> str:
    """What upstream's tables call it; they have no stress."""
    if name == "energy":
        return target
    return name if target == ENERGY else f"{name}[{target}]"
