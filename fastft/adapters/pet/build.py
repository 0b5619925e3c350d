"""Making upstream's PET, from its options or from one of its checkpoints."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from ase.data import atomic_numbers, chemical_symbols
from metatrain.pet import PET
from metatrain.pet.modules.finetuning import copy_head_weights
from metatrain.utils.architectures import get_default_hypers
from metatrain.utils.data import DatasetInfo
from metatrain.utils.data.target_info import get_energy_target_info
from torch import nn

from fastft.adapters.pet.checkpoint import read_model
from fastft.adapters.pet.options import PetOptions
from fastft.errors import AdapterError, ConfigError, nearest

# Modules that hold a target's own weights, by target.
_HEADS = ("node_heads", "edge_heads", "node_last_layers", "edge_last_layers")


def build_model(options: PetOptions, checkpoint: Path | None) -> tuple[PET, tuple[str, ...]]:
    """The model on the CPU, and the names of those of its tensors that the checkpoint lacks.

    Raises:
        ConfigError: options that do not go together, or not with the checkpoint.
        AdapterError: upstream cannot make the model, or it has parts that are not supported.
        CheckpointError: the checkpoint cannot be read.
    """
    model = None if checkpoint is None else read_model(checkpoint)
    if model is None:
        model, new = _from_options(options), ()
    else:
        new = _fit_targets(model, options, cast(Path, checkpoint))
    if unsupported := list(_unsupported(model.hypers)):
        raise AdapterError(
            f"model: must be a PET without {', '.join(unsupported)}, which fastft does not support;"
            " got one with it; train it with upstream"
        )
    model.to(getattr(torch, options.dtype))
    # As upstream trains: composition energies are large.
    model.additive_models.to(torch.float64)
    model.scaler.to(torch.float64)
    return model, new


def heads(target: str) -> list[str]:
    """Names of the modules that hold a target's own weights."""
    return [f"backend.{kind}.{target}" for kind in _HEADS]


def unit_of(model: PET, target: str) -> str:
    """The unit of a target's energies."""
    return model.dataset_info.targets[target].unit


def _from_options(options: PetOptions) -> PET:
    """A model with random weights."""
    if not options.elements:
        raise ConfigError(
            "model.options.elements: must name the model's elements where there is no checkpoint of"
            " PET; got none; add them, such as ['H', 'C', 'O'], or set model.checkpoint"
        )
    if options.inherit_heads is not None:
        raise ConfigError(
            "model.options.inherit_heads: must name a target of a checkpoint; there is none; remove"
            " it, or set model.checkpoint"
        )
    defaults: dict[str, Any] = get_default_hypers("pet")["model"]
    problems = [
        f"model.options.elements: must be chemical symbols; got '{symbol}'"
        f"{nearest(symbol, atomic_numbers)}"
        for symbol in options.elements
        if symbol not in atomic_numbers or symbol == "X"
    ]
    problems += [
        f"model.options.hypers: '{name}' must be one of upstream's{nearest(name, defaults)}"
        for name in options.hypers
        if name not in defaults
    ]
    if problems:
        raise ConfigError(problems)
    numbers = [atomic_numbers[symbol] for symbol in options.elements]
    info = _info(options, numbers, "angstrom")
    try:
        model = PET(cast(Any, {**defaults, **options.hypers}), info)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise AdapterError(
            f"model.options.hypers: upstream must be able to make a PET with {options.hypers}; got"
            f" {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}; correct them"
        ) from error
    for part in (model.additive_models[0], model.scaler):
        _clear_unused(part.get_submodule("model"), numbers)
    return model


def _fit_targets(model: PET, options: PetOptions, checkpoint: Path) -> tuple[str, ...]:
    """Adds the target where the checkpoint has none, drops the others; the names of what is new."""
    info, target = model.dataset_info, options.target
    if problems := list(_contradictions(model, options)):
        raise ConfigError(problems)
    # None in some old files.
    if info.length_unit.lower() not in ("", "a", "angstrom"):
        raise AdapterError(
            f"{checkpoint}: must be a model of lengths in angstrom, as ASE gives them; got"
            f" '{info.length_unit}'; convert data and model with upstream"
        )
    source = options.inherit_heads
    if source is not None and (source not in info.targets or target in info.targets):
        known = [name for name in info.targets if name != target]
        raise ConfigError(
            "model.options.inherit_heads: must name a target of the checkpoint, for a target that"
            f" it has not; got '{source}' for '{target}'{nearest(source, known)}"
        )
    new: tuple[str, ...] = ()
    if target in info.targets:
        _check_known(model, options)
    else:
        before = set(model.state_dict())
        model.restart(_info(options, info.atomic_types, info.length_unit))
        new = tuple(name for name in model.state_dict() if name not in before)
        if source is not None:
            copy_head_weights(model, source, target)
            new = tuple(name for name in new if name.endswith("_buffer"))
    if not options.keep_targets:
        for name in [name for name in model.dataset_info.targets if name != target]:
            _drop(model, name)
    return new


def _contradictions(model: PET, options: PetOptions) -> Iterator[str]:
    """Where the options say something else than the checkpoint does."""
    own = [chemical_symbols[number] for number in model.atomic_types]
    if options.elements and set(options.elements) != set(own):
        yield (
            f"model.options.elements: must be the checkpoint's, {', '.join(own)}; got"
            f" {', '.join(options.elements)}; remove them"
        )
    hypers = cast(dict[str, Any], model.hypers)
    for name, value in options.hypers.items():
        if name not in hypers or hypers[name] != value:
            yield (
                f"model.options.hypers: {name} must be the checkpoint's, {hypers.get(name)}; got"
                f" {value}; remove it"
            )


def _check_known(model: PET, options: PetOptions) -> None:
    info = model.dataset_info.targets[options.target]
    if info.quantity != "energy" or not info.is_scalar or info.sample_kind != "system":
        raise ConfigError(
            f"model.options.target: must be an energy; got '{options.target}', which is another"
            " quantity in the checkpoint; name a variant of its own, such as 'energy/new'"
        )
    if options.unit is not None and options.unit != info.unit:
        raise ConfigError(
            f"model.options.unit: must be that of the checkpoint's '{options.target}',"
            f" '{info.unit}'; got '{options.unit}'; convert the data, or name a new target"
        )


def _info(options: PetOptions, numbers: Sequence[int], length_unit: str) -> DatasetInfo:
    target = {"unit": options.unit or "eV", "description": options.description}
    try:
        info = get_energy_target_info(
            options.target, cast(Any, target), options.forces, options.stress
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model.options.unit: must be an energy's unit that metatomic knows; got"
            f" '{options.unit}' ({error}); correct it, such as to 'eV'"
        ) from error
    return DatasetInfo(length_unit, list(numbers), {options.target: info})


def _drop(model: PET, target: str) -> None:
    """Takes a target off, as upstream's fine-tuning does; it has no function for all of it."""
    model.remove_output(target)
    model.target_names.remove(target)
    model.dataset_info.targets.pop(target, None)
    parts: list[Any] = [*model.additive_models, model.scaler]
    for part in parts:
        if target in part.outputs:
            part.remove_output(target)


def _unsupported(hypers: Any) -> Iterator[str]:
    if hypers["zbl"]:
        yield "ZBL repulsion (zbl)"
    if hypers["long_range"]["enable"]:
        yield "long-range interactions (long_range)"
    if hypers["system_conditioning"]:
        yield "charge and spin (system_conditioning)"


def _clear_unused(module: nn.Module, numbers: Sequence[int]) -> None:
    """Upstream leaves uninitialised memory at types that there are not: same seed, same file."""
    index = module.get_buffer("type_to_index")
    unused = [number for number in range(len(index)) if number not in numbers]
    index[unused] = 0
