"""What upstream's own trainer and exported models make of structures."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from metatomic.torch import System
from metatrain.composition import train_or_load_composition_model
from metatrain.pet import PET
from metatrain.scaler import train_or_load_scaler
from metatrain.utils.additive import get_remove_additive_transform
from metatrain.utils.data import CollateFn, get_dataset, unpack_batch
from metatrain.utils.data.target_info import TargetInfo
from metatrain.utils.evaluate_model import evaluate_model
from metatrain.utils.loss import LossAggregator
from metatrain.utils.neighbor_lists import (
    get_requested_neighbor_lists,
    get_system_with_neighbor_lists_transform,
)
from metatrain.utils.omegaconf import expand_dataset_config
from metatrain.utils.per_atom import average_by_num_atoms
from metatrain.utils.scaler import get_remove_scale_transform
from metatrain.utils.transfer import batch_to
from omegaconf import OmegaConf


class Upstream:
    """A model of upstream's and a file's structures as its trainer sees them."""

    def __init__(self, model: PET, file: Path, target: str = "energy", stress: bool = True) -> None:
        entry: dict[str, Any] = {
            "quantity": "energy",
            "read_from": str(file),
            "reader": "ase",
            "key": "energy",
            "unit": "eV",
            "forces": {"read_from": str(file), "reader": "ase", "key": "forces"},
            # Upstream looks for it, unless told not to.
            "stress": stress and {"read_from": str(file), "reader": "ase", "key": "stress"},
        }
        systems = {"read_from": str(file), "reader": "ase", "length_unit": "angstrom"}
        config = OmegaConf.create({"systems": systems, "targets": {target: entry}})
        self.dataset, self.infos, _ = get_dataset(expand_dataset_config(config)[0])
        self.model, self.target = model, target

    def fit(self) -> None:
        """Composition energies and scale."""
        models = self.model.additive_models
        train_or_load_composition_model(
            composition_model=cast(Any, models[0]),
            atomic_baseline={},
            train_datasets=[self.dataset],
            other_additive_models=[],
            batch_size=16,
            is_distributed=False,
            checkpoint_dir="",
        )
        train_or_load_scaler(
            scaler=self.model.scaler,
            fixed_weights={},
            train_datasets=[self.dataset],
            additive_models=list(models),
            batch_size=16,
            is_distributed=False,
            checkpoint_dir="",
            per_structure_targets=[],
        )

    def loss(self) -> torch.Tensor:
        """Of all structures as one batch, in train mode."""
        dtype = next(self.model.parameters()).dtype
        self.model.train()
        additive = copy.deepcopy(self.model.additive_models)
        systems, targets = self._batch(
            get_remove_additive_transform(list(additive), self.infos),
            get_remove_scale_transform(copy.deepcopy(self.model.scaler)),
        )
        systems, targets, extra = batch_to(systems, targets, {}, dtype=dtype)
        made = evaluate_model(self.model, systems, self.infos, is_training=True)
        made, targets = (average_by_num_atoms(maps, systems, []) for maps in (made, targets))
        return LossAggregator(targets=self.infos, config=cast(Any, {}))(made, targets, extra)

    def predict(self, model: Any) -> dict[str, torch.Tensor]:
        """What `mtt eval` gets from a model, structures in a row."""
        dtype = next(model.parameters()).dtype
        systems, targets = self._batch()
        systems, _, _ = batch_to(systems, targets, {}, dtype=dtype)
        infos: dict[str, TargetInfo] = self.infos
        block = evaluate_model(model, systems, infos, is_training=False)[self.target].block()
        found = {
            "energy": block.values.detach()[:, 0],
            "forces": -block.gradient("positions").values.detach()[..., 0],
        }
        if "strain" in block.gradients_list():
            found["virial"] = block.gradient("strain").values.detach()[..., 0]
        return found

    def _batch(self, *transforms: Any) -> tuple[list[System], dict[str, Any]]:
        neighbours = get_requested_neighbor_lists(self.model)
        collate = CollateFn(
            target_keys=[self.target],
            callables=[get_system_with_neighbor_lists_transform(neighbours), *transforms],
        )
        samples = [self.dataset[i] for i in range(len(self.dataset))]
        systems, targets, _ = unpack_batch(collate(samples))
        return systems, targets
