"""Making upstream's PET, from its options or from one of its checkpoints."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from ase.data import atomic_numbers, chemical_symbols
from metatrain.pet import PET
from metatrain.utils.architectures import get_default_hypers
from metatrain.utils.data import DatasetInfo
from torch import nn

from fastft.adapters.pet.checkpoint import SUFFIX, read_model
from fastft.adapters.pet.lora import add_lora
from fastft.adapters.pet.options import PetOptions
from fastft.adapters.pet.targets import (
    HEADS,
    RunTargets,
    describe_fit,
    fit_targets,
    make_infos,
    settings_of,
)
from fastft.errors import AdapterError, ConfigError, nearest


@dataclass(frozen=True)
class Built:
    """A model, and what of it is not the checkpoint's.

    Attributes:
        model: on the CPU.
        new: names of the tensors that the checkpoint lacks.
        fresh: the targets among those that are trained that it lacks; all without a checkpoint.
        notes: for the load report.
    """

    model: PET
    new: tuple[str, ...]
    fresh: tuple[str, ...]
    notes: tuple[str, ...] = ()


def build_model(options: PetOptions, targets: RunTargets, checkpoint: Path | None) -> Built:
    """The model with the run's targets.

    Raises:
        ConfigError: options that do not go together, or not with the checkpoint.
        AdapterError: upstream cannot make the model, or it has parts that are not supported.
        CheckpointError: the checkpoint cannot be read.
    """
    model = None if checkpoint is None else read_model(checkpoint)
    if model is None:
        # Another file has all that the model has, or the core says what it lacks.
        fresh = targets.trained if checkpoint is None else ()
        built = Built(_from_options(options, targets, checkpoint), (), fresh)
    else:
        built = _from_checkpoint(model, options, targets, cast(Path, checkpoint))
    model = built.model
    if parts := list(unsupported(model.hypers)):
        raise AdapterError(
            f"model: must be a PET without {', '.join(parts)}, which fastft does not support;"
            " got one with it; train it with upstream"
        )
    known = model.dataset_info.targets
    if options.export_as_energy not in (None, *known):
        raise ConfigError(
            "model.options.export_as_energy: must be a target of the model; got"
            f" '{options.export_as_energy}'{nearest(str(options.export_as_energy), known)}"
        )
    if options.lora is not None:
        built = replace(built, new=(*built.new, *add_lora(model, options.lora, checkpoint)))
    model.to(getattr(torch, options.dtype))
    # As upstream trains: composition energies are large.
    model.additive_models.to(torch.float64)
    model.scaler.to(torch.float64)
    return built


def start_anew(model: PET, names: Container[str]) -> None:
    """Puts the parameters of these names at random, as upstream starts them."""
    for prefix, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if any(f"{prefix}.{name}" in names for name in own):
            # Upstream has torch's layers only, and starts them as torch does.
            cast(Any, module).reset_parameters()


def trained_by_heads(model: PET, options: PetOptions, targets: Sequence[str]) -> list[str]:
    """The modules that `finetune.method = 'heads'` trains.

    Raises:
        ConfigError: a module that the model has not.
    """
    known = [name for name, _ in model.backend.named_modules() if name]
    names, problems = [], []
    for setting in ("head_modules", "last_layer_modules"):
        for module in getattr(options, setting):
            module = module.removeprefix("backend.")
            if module not in known:
                problems.append(
                    f"model.options.{setting}: must be modules of PET; got '{module}'"
                    f"{nearest(module, [*HEADS, *known])}"
                )
            own = targets if module in HEADS else [None]
            names += [
                f"backend.{module}.{target}" if target else f"backend.{module}" for target in own
            ]
    if problems:
        raise ConfigError(problems)
    return names


def _from_options(options: PetOptions, targets: RunTargets, checkpoint: Path | None) -> PET:
    """A model with random weights."""
    if not options.elements:
        raise ConfigError(
            f"model.checkpoint: must be a {SUFFIX} of `mtt train`, unless model.options.elements"
            f" and hypers say what model it is; got '{checkpoint}'; name the {SUFFIX}, or set these"
            if checkpoint is not None
            else "model.options.elements: must name the model's elements where there is no"
            " checkpoint; got none; add them, such as ['H', 'C', 'O'], or set model.checkpoint"
        )
    defaults: dict[str, Any] = get_default_hypers("pet")["model"]
    problems = [
        f"{settings_of(options, target)[0]}.inherit_heads: must name a target of a checkpoint;"
        " there is none; remove it, or set model.checkpoint"
        for target in targets.names
        if settings_of(options, target)[1].inherit_heads is not None
    ]
    problems += [
        f"data: targets that are evaluated must be trained; got '{target}'"
        f"{nearest(target, targets.trained)}"
        for target in targets.evaluated
    ]
    problems += [
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
    info = DatasetInfo("angstrom", numbers, make_infos(options, targets.trained))
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


def _from_checkpoint(
    model: PET, options: PetOptions, targets: RunTargets, checkpoint: Path
) -> Built:
    """The checkpoint's model with the run's targets."""
    info = model.dataset_info
    if problems := list(_contradictions(model, options)):
        raise ConfigError(problems)
    # None in some old files.
    if info.length_unit.lower() not in ("", "a", "angstrom"):
        raise AdapterError(
            f"{checkpoint}: must be a model of lengths in angstrom, as ASE gives them; got"
            f" '{info.length_unit}'; convert data and model with upstream"
        )
    known = {name: target.unit for name, target in info.targets.items()}
    new = fit_targets(model, options, targets)
    fresh = tuple(target for target in targets.trained if target not in known)
    return Built(model, new, fresh, tuple(describe_fit(known, options, targets)))


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


def unsupported(hypers: Any) -> Iterator[str]:
    """Parts of a model that fastft does not train."""
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
