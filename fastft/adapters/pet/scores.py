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
            factor = 1e3 if unit.lower() == "ev" else 1.0
            for name, each in sums.items():
                absolute, square, count = each[index]
                if count:
                    mae, rmse = (score_name(name, target, unit, e) for e in ("mae", "rmse"))
                    values[mae] = factor * absolute / count
                    values[rmse] = factor * (square / count) ** 0.5
        return values

    def reset(self) -> None:
        """Forgets all batches."""
        self._sums = {}


def score_name(name: str, target: str, unit: str, error: str) -> str:
    """What a score is called, as upstream's tables have it: 'forces[energy/pbe0]_mae_...'."""
    start = name if target == ENERGY else f"{name}[{target}]"
    if name == "energy":
        start = target
    plain = "mev" if unit.lower() == "ev" else re.sub(r"\W+", "_", unit.lower()).strip("_")
    return f"{start}_{error}_{plain}_per_{_PER[name]}"


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
