"""Energies of the atoms alone, and the scale of what is left: fitted and stored as upstream does.

    E = sum over atoms of w[species] + scale * (what the network says)

Upstream holds both serialised in buffers of bytes, one set per target, so that checkpoints have
them. The scale is the root mean square of (E - composition) / atoms over the training data.
"""

from collections.abc import Sequence
from typing import Any, cast

import metatensor.torch
import torch
from metatomic.torch import System, unit_conversion_factor

# Not exported, but what upstream's own fits run; the package's version is pinned.
from metatrain.composition._base_composition import BaseCompositionModel
from metatrain.pet import PET
from metatrain.scaler._base_scaler import BaseScaler
from torch import Tensor

from fastft.errors import DataError
from fastft.task import Sample

# Its names come from compiled code, where type checkers see none.
mts: Any = metatensor.torch

# Structures per part of the sums: upstream's batch size, whose rounding is then the same.
_PART = 16


class Baseline:
    """Composition energies and scale of a target, as the model's buffers hold them.

    They are read from the device anew only where a buffer was written to since, and into the same
    memory, which a CUDA graph may read.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._seen: Any = None
        self._values: tuple[Tensor, Tensor] | None = None

    def __call__(self, model: PET) -> tuple[Tensor, Tensor]:
        """Energy of each of the model's types, `[types]`, and scale, scalar; float64."""
        buffers = (
            model.additive_models[0].get_buffer(f"{self._target}_composition_buffer"),
            model.scaler.get_buffer(f"{self._target}_scaler_buffer"),
        )
        seen = [(buffer.data_ptr(), buffer._version) for buffer in buffers]
        if self._values is None or seen != self._seen:
            device = buffers[0].device
            weights, scale = (mts.load_buffer(b.cpu()).block().values.flatten() for b in buffers)
            found = (weights.to(device), scale[0].to(device))
            if self._values is None or self._values[0].device != device:
                self._values = found
            else:
                for kept, value in zip(self._values, found, strict=True):
                    kept.copy_(value)
            self._seen = seen
        return self._values


def composition(model: PET, target: str) -> tuple[dict[int, float], float]:
    """A target's composition energies by atomic number, and its scale."""
    weights, scale = Baseline(target)(model)
    numbers = torch.tensor(model.atomic_types, device=weights.device)
    energies = weights[type_index(model, numbers)].tolist()
    return dict(zip(model.atomic_types, energies, strict=True)), scale.item()


def type_index(model: PET, species: Tensor) -> Tensor:
    """Number of each atom's type among the model's, `[N]`."""
    return cast(Tensor, cast(Any, model.additive_models[0]).model.type_to_index)[species]


def copy_scale(model: PET, source: str, target: str) -> None:
    """Gives a target the scale of another, in its own unit."""
    infos = model.dataset_info.targets
    factor = unit_conversion_factor(infos[source].unit, infos[target].unit)
    for name in ("scaler_buffer", "per_target_scaler_buffer"):
        scale = mts.load_buffer(model.scaler.get_buffer(f"{source}_{name}").cpu())
        scale.block().values.mul_(factor)
        _write(model.scaler, f"{target}_{name}", scale)


def fit_baseline(model: PET, target: str, samples: Sequence[Sample]) -> None:
    """Fits composition energies and scale to structures with an energy, into the model's buffers.

    Raises:
        DataError: there is no such structure, or composition alone says all energies.
    """
    labelled = [sample for sample in samples if "energy" in sample]
    if not labelled:
        raise DataError(
            "composition energies: must be fitted to structures with energies; got none; add some"
        )
    layout = model.dataset_info.targets[target].layout
    composition = BaseCompositionModel(model.atomic_types, {target: layout})
    scaler = BaseScaler(model.atomic_types, {target: layout})
    parts = [_part(labelled[i : i + _PART]) for i in range(0, len(labelled), _PART)]
    for systems, energies in parts:
        composition.accumulate(systems, {target: _energies(energies, layout)})
    composition.fit(targets_to_fit=[target])
    weights = composition.weights[target].block().values
    for systems, energies in parts:
        counts = composition._compute_X_per_structure(systems)
        atoms = counts.sum(1, keepdim=True)
        left = (energies - counts @ weights) / atoms
        scaler.accumulate(systems, {target: _energies(left, layout)})
    scaler.fit(targets_to_fit=[target])
    scale = scaler.scales[target].block().values
    if not scale.min() > 0:
        raise DataError(
            "energies: must differ from what composition alone says, for a scale of"
            f" '{target}'; got none that does; add structures of other shapes"
        )
    _write(model.additive_models[0], f"{target}_composition_buffer", composition.weights[target])
    _write(model.scaler, f"{target}_scaler_buffer", scaler.scales[target])
    _write(model.scaler, f"{target}_per_target_scaler_buffer", scaler.per_target_scales[target])


def _part(samples: Sequence[Sample]) -> tuple[list[System], Tensor]:
    systems = []
    for structure in (sample["structure"] for sample in samples):
        systems.append(
            System(
                types=torch.from_numpy(structure["species"]).to(torch.int32),
                positions=torch.from_numpy(structure["positions"]),
                cell=torch.from_numpy(structure["cell"]),
                pbc=torch.from_numpy(structure["pbc"]),
            )
        )
    energies = torch.tensor([[float(s["energy"])] for s in samples], dtype=torch.float64)
    return systems, energies


def _energies(values: Tensor, layout: Any) -> Any:
    samples = mts.Labels(["system"], torch.arange(len(values)).reshape(-1, 1))
    block = mts.TensorBlock(values.clone(), samples, [], layout.block().properties)
    return mts.TensorMap(layout.keys, [block])


@torch.no_grad()
def _write(module: torch.nn.Module, name: str, values: Any) -> None:
    content = mts.save_buffer(mts.make_contiguous(values.to("cpu", torch.float64)))
    module.get_buffer(name).copy_(content)
