"""Targets: the energies that a model has heads, composition energies and a scale for.

A run's are those of its data sets: what is trained first, then what is only evaluated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from metatomic.torch import unit_conversion_factor
from metatrain.pet import PET
from metatrain.pet.modules.finetuning import copy_head_weights
from metatrain.utils.data import DatasetInfo
from metatrain.utils.data.target_info import TargetInfo, get_energy_target_info

from fastft.adapters.pet.baseline import copy_scale
from fastft.adapters.pet.options import AtomsOptions, PetOptions, TargetOptions
from fastft.config import DataConfig, DataSource
from fastft.errors import ConfigError, nearest
from fastft.names import is_under
from fastft.runfile import parse

# Modules that hold a target's own weights, by target.
LAST_LAYERS = ("node_last_layers", "edge_last_layers")
HEADS = ("node_heads", "edge_heads", *LAST_LAYERS)
_BUFFERS = ("scaler_buffer", "per_target_scaler_buffer", "per_property_scaler_buffer")
ENERGY = "energy"
# Of a new target.
_DEFAULT_UNIT = "eV"


@dataclass(frozen=True)
class RunTargets:
    """The targets of a run's data sets, as `batch["target"]` counts them.

    Attributes:
        trained: those of training data sets.
        evaluated: further ones, of validation and test data.
        mixed: whether training batches may hold several.
    """

    trained: tuple[str, ...]
    evaluated: tuple[str, ...] = ()
    mixed: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.trained, *self.evaluated)


def atoms_options(source: DataSource) -> AtomsOptions:
    """A data set's `options`."""
    return parse(AtomsOptions, source.options, key=f"{source.path}: options")


def find_targets(options: PetOptions, data: DataConfig) -> RunTargets:
    """The targets that the run file's data sets name.

    Raises:
        ConfigError: options of targets that no data set names.
    """
    trained, evaluated = (
        dict.fromkeys(atoms_options(source).target or options.target for source in sources)
        for sources in (data.train, [*data.validation, *data.test])
    )
    more = tuple(name for name in evaluated if name not in trained)
    found = RunTargets(tuple(trained), more, mixed=data.mixing == "sample")
    problems = [
        f"model.options.targets: must be named by data sets, and not be model.options.target; got"
        f" '{name}'{nearest(name, found.names)}"
        for name in options.targets
        if name not in found.names or name == options.target
    ]
    own = TargetOptions(
        inherit_heads=options.inherit_heads, unit=options.unit, description=options.description
    )
    if options.target not in found.names and own != TargetOptions():
        problems.append(
            "model.options.target: must be a data set's, where inherit_heads, unit or description"
            f" are set; got '{options.target}'{nearest(options.target, found.names)}"
        )
    if problems:
        raise ConfigError(problems)
    return found


def settings_of(options: PetOptions, target: str) -> tuple[str, TargetOptions]:
    """Where in the run file a target's settings are, and they."""
    if target == options.target:
        return "model.options", options
    return f"model.options.targets.{target}", options.targets.get(target, TargetOptions())


def heads(targets: Sequence[str]) -> list[str]:
    """Names of the modules that hold targets' own weights."""
    return [f"backend.{kind}.{target}" for target in targets for kind in HEADS]


def unit_of(model: PET, target: str) -> str:
    """The unit of a target's energies."""
    return model.dataset_info.targets[target].unit


def make_infos(options: PetOptions, targets: Sequence[str]) -> dict[str, TargetInfo]:
    """What upstream must know of new targets."""
    infos = {}
    for target in targets:
        where, own = settings_of(options, target)
        text = {"unit": own.unit or _DEFAULT_UNIT, "description": own.description}
        try:
            # metatomic takes a unit of anything for a target.
            unit_conversion_factor(text["unit"], _DEFAULT_UNIT)
            infos[target] = get_energy_target_info(
                target, cast(Any, text), options.forces, options.stress
            )
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{where}.unit: must be an energy's unit that metatomic knows; got '{own.unit}'"
                f" ({error}); correct it, such as to 'eV'"
            ) from error
    return infos


def fit_targets(model: PET, options: PetOptions, targets: RunTargets) -> tuple[str, ...]:
    """Adds the targets that the checkpoint lacks, and drops those that are not wanted.

    Those of the checkpoint that state no unit get the run file's.

    Returns:
        Names of the tensors that are not the checkpoint's.

    Raises:
        ConfigError: options that do not go with the checkpoint.
    """
    known = dict(model.dataset_info.targets)
    if problems := list(_misfits(known, options, targets)):
        raise ConfigError(problems)
    unitless = [name for name in targets.names if name in known and not known[name].unit]
    stated = [name for name in unitless if settings_of(options, name)[1].unit]
    for target, info in make_infos(options, stated).items():
        _set_unit(model, target, info.unit)
    fresh = [name for name in targets.trained if name not in known]
    before = set(model.state_dict())
    if fresh:
        _add(model, make_infos(options, fresh))
    new = [name for name in model.state_dict() if name not in before]
    for target in fresh:
        if (source := settings_of(options, target)[1].inherit_heads) is not None:
            copy_head_weights(model, source, target)
            # What they count in, until the target's own is fitted.
            copy_scale(model, source, target)
            new = [name for name in new if f".{target}." not in name]
    if not options.keep_targets:
        for name in [name for name in known if name not in targets.names]:
            _drop(model, name)
    return tuple(new)


def describe_fit(
    known: Mapping[str, str], options: PetOptions, targets: RunTargets
) -> Iterator[str]:
    """What becomes of targets, for the load report.

    Args:
        known: units of the checkpoint's targets, by name; empty where it states none.
    """
    rescaled = "rescaled" if options.rescale_heads else "not rescaled"
    for target in targets.names:
        where, own = settings_of(options, target)
        if own.unit and known.get(target) == "":
            yield (
                f"target '{target}': the checkpoint states no unit; it is {own.unit}, from {where}"
            )
    for target in targets.trained:
        if target in known:
            fit = f"are fitted anew, its heads {rescaled}" if options.fit == "always" else "stay"
            yield f"target '{target}': its composition energies and scale {fit}"
        else:
            own = settings_of(options, target)[1]
            source = own.inherit_heads
            start = f"start as those of '{source}', {rescaled}" if source else "start at random"
            if source and not (known[source] or settings_of(options, source)[1].unit):
                unit = own.unit or _DEFAULT_UNIT
                start += (
                    f"; '{source}' states no unit and is taken to be in {unit}, as '{target}' is"
                )
            yield f"new target '{target}': its heads {start}"
    others = [name for name in known if name not in targets.trained]
    kept = [name for name in others if options.keep_targets or name in targets.evaluated]
    if kept:
        yield (
            f"targets kept, but not trained: {_listed(kept)}; their heads fit as long as all else"
            " is frozen"
        )
    if dropped := [name for name in others if name not in kept]:
        yield (
            f"targets dropped, since no data set holds them: {_listed(dropped)};"
            " model.options.keep_targets = true keeps them"
        )


def last_layers(target: str, random: Sequence[str] = ()) -> list[str]:
    """Names of a target's last layers, but for those of heads that are at random.

    Args:
        random: names of modules or parameters that start at random, whole heads or parts of them.
    """
    names = []
    for kind in LAST_LAYERS:
        last, head = (
            f"backend.{module}.{target}" for module in (kind, kind.replace("last_layers", "heads"))
        )
        within = any(is_under(name, (last, head)) for name in random)
        if not within and not is_under(last, random) and not is_under(head, random):
            names.append(last)
    return names


@torch.no_grad()
def rescale_heads(model: PET, layers: Sequence[str], factor: float) -> None:
    """Multiplies what heads say, by their last layers."""
    for layer in layers:
        for name, parameter in model.get_submodule(layer).named_parameters():
            # A low-rank update B A is multiplied once.
            if ".lora_A." not in name:
                parameter.mul_(factor)


@torch.no_grad()
def rename_to_energy(model: PET, target: str) -> None:
    """Gives a target the name 'energy', in place of one that has it."""
    if target == ENERGY:
        return
    if ENERGY in model.dataset_info.targets:
        _drop(model, ENERGY)
    _add(model, {ENERGY: model.dataset_info.targets[target]})
    copy_head_weights(model, target, ENERGY)
    for part, names in (
        (model.additive_models[0], ["composition_buffer"]),
        (model.scaler, _BUFFERS),
    ):
        for name in names:
            part.get_buffer(f"{ENERGY}_{name}").copy_(part.get_buffer(f"{target}_{name}"))
    _drop(model, target)


def _misfits(
    known: Mapping[str, TargetInfo], options: PetOptions, targets: RunTargets
) -> Iterator[str]:
    """Where targets and their options do not go with the checkpoint's."""
    for target in targets.names:
        where, own = settings_of(options, target)
        info, source = known.get(target), own.inherit_heads
        if source is not None and info is not None:
            yield (
                f"{where}.inherit_heads: must be absent where the checkpoint has heads of the"
                f" target, '{target}'; got '{source}'; remove it"
            )
        elif source is not None and source not in known:
            yield (
                f"{where}.inherit_heads: must name a target of the checkpoint; got '{source}' for"
                f" '{target}'{nearest(source, known)}"
            )
        elif source is not None and known[source].quantity != "energy":
            yield (
                f"{where}.inherit_heads: must name an energy; got '{source}', which is another"
                " quantity in the checkpoint; name an energy, or remove it"
            )
        if info is None:
            if target in targets.evaluated:
                yield (
                    "data: targets that are evaluated must be trained, or be the checkpoint's; got"
                    f" '{target}'{nearest(target, [*targets.trained, *known])}"
                )
            continue
        if info.quantity != "energy" or not info.is_scalar or info.sample_kind != "system":
            yield (
                f"model.options.target: must be an energy; got '{target}', which is another"
                " quantity in the checkpoint; name a variant of its own, such as 'energy/new'"
            )
        elif own.unit is not None and info.unit and own.unit != info.unit:
            yield (
                f"{where}.unit: must be that of the checkpoint's '{target}', '{info.unit}'; got"
                f" '{own.unit}'; convert the data, or name a new target"
            )


def _set_unit(model: PET, target: str, unit: str) -> None:
    """In what checkpoints hold, and in what each part was made with from it."""
    model.dataset_info.targets[target].unit = unit
    parts: list[Any] = [model, *model.additive_models, model.scaler]
    for part in parts:
        if target in part.outputs:
            part.outputs[target].unit = unit


def _add(model: PET, infos: dict[str, TargetInfo]) -> None:
    info = model.dataset_info
    model.restart(DatasetInfo(info.length_unit, list(info.atomic_types), infos))


def _drop(model: PET, target: str) -> None:
    """Takes a target off, as upstream's fine-tuning does; it has no function for all of it."""
    model.remove_output(target)
    model.target_names.remove(target)
    model.dataset_info.targets.pop(target, None)
    parts: list[Any] = [*model.additive_models, model.scaler]
    for part in parts:
        if target in part.outputs:
            part.remove_output(target)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
