"""Errors of energies, forces and stress, by name and unit."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastft.task import Batch

# Name in `predictions` and in the batch -> what its unit is per.
_PER = {"energy": "atom", "forces": "angstrom", "stress": "cubic_angstrom"}


class PetScores:
    """Mean absolute and root-mean-square errors: 'forces_mae_mev_per_angstrom'.

    Energies are per atom; forces and stress count by component. Of a target in eV they are in meV,
    as upstream's tables, else in its own unit. What has no label in the data is left out.
    """

    def __init__(self, unit: str) -> None:
        ev = unit.lower() == "ev"
        self._factor = 1e3 if ev else 1.0
        self._unit = "mev" if ev else re.sub(r"\W+", "_", unit.lower()).strip("_")
        self._sums: dict[str, Tensor] = {}

    def update(self, predictions: Mapping[str, Tensor], batch: Batch, /) -> None:
        """Adds a batch."""
        for name, predicted in predictions.items():
            error = predicted.double() - batch[name]
            if name == "energy":
                error = error / batch["atoms"]
            present = ~error.isnan()
            error = torch.where(present, error, 0)
            sums = torch.stack([error.abs().sum(), error.square().sum(), present.sum().double()])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def compute(self) -> Mapping[str, float]:
        """The errors so far."""
        values = {}
        for name, sums in self._sums.items():
            absolute, square, count = sums.tolist()
            if count:
                unit = f"{self._unit}_per_{_PER[name]}"
                values[f"{name}_mae_{unit}"] = self._factor * absolute / count
                values[f"{name}_rmse_{unit}"] = self._factor * (square / count) ** 0.5
        return values

    def reset(self) -> None:
        """Forgets all batches."""
        self._sums = {}
