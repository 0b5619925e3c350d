"""Checkpoints of PET, as `mtt train` writes them: read, written and described.

They are pickles of upstream's own classes, which can run any code when they are read.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from ase.data import chemical_symbols
from metatrain.pet import PET
from metatrain.pet.trainer import Trainer
from metatrain.utils.io import model_from_checkpoint
from torch import Tensor

from fastft.errors import CheckpointError, ConfigError
from fastft.names import state_dict
from fastft.task import Description

SUFFIX = ".ckpt"
# What a file can raise that is no pickle, or one of classes that are not there.
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError),
    *(ImportError, AttributeError),
)


def read_model(path: Path) -> PET | None:
    """The model of a checkpoint, upgraded to the present format; upstream's best, not its last.

    Returns:
        None where the file is not named as upstream's are; the core then reads it.

    Raises:
        CheckpointError: there is none, or none of PET, or of a later format.
    """
    if path.suffix != SUFFIX:
        return None
    if not path.is_file():
        raise CheckpointError(
            f"{path}: must be a checkpoint of metatrain; got no such file; check the path"
        )
    try:
        content = torch.load(path, "cpu", weights_only=False)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}: must be a checkpoint of metatrain; got {type(error).__name__}: {error}; give"
            " a file that `mtt train` wrote"
        ) from error
    kind = content.get("architecture_name") if isinstance(content, dict) else None
    if kind != "pet":
        raise CheckpointError(
            f"{path}: must be a checkpoint of PET; got"
            f" {f'one of {kind!r}' if kind else 'another file'}; give a file that `mtt train` wrote"
        )
    try:
        return cast(PET, model_from_checkpoint(content, context="finetune"))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: must be a checkpoint that the installed metatrain reads; got {error}; install"
            " the version that wrote it, or upgrade it there"
        ) from error


def save(model: PET, path: Path) -> None:
    """Writes a checkpoint for `mtt export`, `mtt eval` after it, and `mtt train` to go on from.

    Optimizer and schedule start anew there.

    Raises:
        ConfigError: the file's name is not one that upstream reads.
    """
    if path.suffix != SUFFIX:
        raise ConfigError(
            f"--to: must end in {SUFFIX}, as metatrain's checkpoints do; got '{path.suffix}'"
        )
    content = model.get_checkpoint()
    # In the model's order: upstream takes the dtype from the second entry. Two dicts, since
    # upstream's reader takes the configuration out.
    weights = {name: _alone(tensor) for name, tensor in state_dict(model).items()}
    # LoRA of upstream's own stays a part of the model; other methods leave nothing to redo.
    config = model.finetune_config if model.finetune_config.get("method") == "lora" else {}
    for name in ("model_state_dict", "best_model_state_dict"):
        content[name] = {**weights, "finetune_config": config}
    content |= {
        "trainer_ckpt_version": Trainer.__checkpoint_version__,
        "train_hypers": {},
        # Any later result of upstream's is better.
        "best_metric": float("inf"),
        "optimizer_state_dict": None,
        "scheduler_state_dict": None,
        "best_optimizer_state_dict": None,
    }
    torch.save(content, path)


def describe(path: Path) -> Description | None:
    """Targets, elements and sizes; None where the file is no checkpoint of upstream's."""
    model = read_model(path) if zipfile.is_zipfile(path) else None
    if model is None:
        return None
    hypers: Any = model.hypers
    targets = [f"{n} ({i.unit or 'no unit'})" for n, i in model.dataset_info.targets.items()]
    adaptive = hypers["num_neighbors_adaptive"]
    neighbours = f", adapted to {adaptive} neighbours" if adaptive else ""
    layers = f"{hypers['num_gnn_layers']} x {hypers['num_attention_layers']}"
    return Description(
        str(path),
        [
            ("targets", ", ".join(targets)),
            ("elements", ", ".join(chemical_symbols[n] for n in model.atomic_types)),
            ("cutoff", f"{hypers['cutoff']} {model.dataset_info.length_unit}{neighbours}"),
            ("layers", f"{layers} of attention, {hypers['d_pet']} wide"),
            ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ],
    )


def _alone(tensor: Tensor) -> Tensor:
    """A copy on the CPU: a view would take the whole of its memory along."""
    return tensor.detach().to("cpu", copy=True).contiguous()
