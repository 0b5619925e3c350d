"""Checkpoints of Aurora: reading any that upstream reads, and writing what upstream reads."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aurora
import safetensors.torch
import torch
from aurora.normalisation import level_to_str
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from fastft.adapters.aurora.build import (
    argument,
    default_variables,
    fixed_arguments,
    low_rank,
    model_class,
    new_parameters,
    stabilised,
    timestep_hours,
)
from fastft.adapters.aurora.extend import aurora_of, norms_of, place_of
from fastft.adapters.aurora.options import AuroraOptions
from fastft.adapters.aurora.variables import Variables
from fastft.atomic import write_file_atomically
from fastft.errors import AdapterError, CheckpointError, ConfigError
from fastft.names import state_dict
from fastft.task import Description

_SUFFIXES = (".ckpt", ".pt", ".pth")
_EMBEDDINGS = ("encoder.surf_token_embeds.", "encoder.atmos_token_embeds.")


def read_weights(path: Path, options: AuroraOptions) -> dict[str, Tensor] | None:
    """A checkpoint's tensors under the present names, as the class itself converts them.

    That takes off the prefix 'net.', splits embeddings and heads that old files number by
    variable, and fills up a shorter history with zeros. Where the model has embeddings and heads of
    each level (`level_condition`) and the file has one for all, each level gets a copy.

    Returns:
        None where the file is no flat dict of Aurora's tensors; the core then reads it.

    Raises:
        CheckpointError: the class cannot read them, as where they number other variables.
    """
    tensors = _flat_tensors(path)
    if tensors is None:
        return None
    tensors = {name.removeprefix("net."): tensor for name, tensor in tensors.items()}
    embedding = next((t for name, t in tensors.items() if _is_embedding(name)), None)
    if embedding is None:
        return None
    try:
        levels = argument(options, "level_condition") if _has_no_levels(tensors) else None
        # AuroraAirPollution's own way asks for levels.
        kind = aurora.Aurora if levels and _is_air_pollution(options) else model_class(options)
        tensors = _adapt(tensors, options, embedding.shape[-1], kind)
        if levels:
            tensors = _spread_over_levels(tensors, [level_to_str(level) for level in levels])
    except (AssertionError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: must be a checkpoint that {options.model_class} reads, with its own variables"
            f" where it numbers them; got {error or 'other sizes'} ({type(error).__name__}); choose"
            " the class that the file is of, or convert the file to names"
        ) from error
    history = min(t.shape[2] for name, t in tensors.items() if _is_embedding(name))
    if history < (longest := argument(options, "max_history_size")):
        stand_in = cast(aurora.Aurora, SimpleNamespace(max_history_size=longest))
        aurora.Aurora.adapt_checkpoint_max_history_size(stand_in, tensors)
    return tensors


def load_hub(model: aurora.Aurora, options: AuroraOptions, variables: Variables) -> None:
    """Fills the model with its class's weights from the hub.

    New variables stay as they are, and low-rank updates that the class's weights have not.

    Raises:
        AdapterError: they cannot be fetched, or do not fit the model but for its variables.
    """
    names = (model.default_checkpoint_repo, model.default_checkpoint_name)
    try:
        file = hf_hub_download(*names, revision=model.default_checkpoint_revision)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"model.options.hub: {'/'.join(names)} must be fetched; got {type(error).__name__}:"
            f" {error}; connect to the network, or set hub = false and model.checkpoint"
        ) from error
    tensors = read_weights(Path(file), options) or {}
    own = model.state_dict()
    # Inserted by this option; upstream's checkpoints were trained without.
    inserted = ".ln_k.", ".ln_q."
    fresh = {*new_parameters(model, variables), *low_rank(model)}
    missing = [
        name
        for name in own
        if name not in tensors
        and name not in fresh
        and not (options.stabilise_level_agg and any(part in name for part in inserted))
    ]
    # Of variables that the run leaves out.
    left_out = (*_EMBEDDINGS, "decoder.surf_heads.", "decoder.atmos_heads.")
    problems = {
        "missing": missing,
        "unexpected": [n for n in tensors if n not in own and not n.startswith(left_out)],
        "of another shape": [n for n, t in tensors.items() if n in own and own[n].shape != t.shape],
    }
    if any(problems.values()):
        text = "; ".join(f"{len(n)} {kind}, first {n[0]}" for kind, n in problems.items() if n)
        raise AdapterError(
            f"model.options.hub: {'/'.join(names)} must fit {options.model_class} with"
            f" model.options.arguments; got {text}; leave arguments of other sizes out, or set"
            " hub = false"
        )
    model.load_state_dict({n: t for n, t in tensors.items() if n in own}, strict=False)


def save(model: nn.Module, options: AuroraOptions, variables: Variables, path: Path) -> None:
    """Writes a file for `load_checkpoint_local`, and its variables and statistics beside it.

    Raises:
        ConfigError: the file's name says another format, or upstream could not read it.
    """
    if "2t" not in (*variables.surf, *variables.static):
        raise ConfigError(
            "model.options.surf_vars: must hold '2t' for an export, since load_checkpoint_local"
            f" reads the size of the history off its embedding; got {', '.join(variables.surf)};"
            " take it in"
        )
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            f"--to: must end in {', '.join(_SUFFIXES)}, the format that aurora reads; got"
            f" '{path.suffix}'"
        )
    place = place_of(model)
    # Copies: views would take the whole of their memory along.
    state = {
        name.removeprefix(place): tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in state_dict(model).items()
    }
    if argument(options, "simulate_indexing_bug"):
        _share_static_z(state)
    _check_readable(state, options)
    torch.save(state, path)
    # The core writes under a temporary name first (`fastft.atomic`), and renames that file alone.
    target = path.with_name(path.name.removeprefix(".tmp-"))
    record = {**_record(options, variables), "layer_norms": norms_of(aurora_of(model))}
    text = json.dumps(record, indent=2) + "\n"
    write_file_atomically(
        target.with_name(f"{target.name}.json"),
        lambda file: file.write_text(text, encoding="utf-8"),
    )


def describe(path: Path, options: AuroraOptions) -> Description | None:
    """Variables, levels and sizes; None where the file is no checkpoint of Aurora's."""
    if not path.is_file():
        return None
    tensors = read_weights(path, options)
    if tensors is None:
        return None
    return Description(str(path), list(_rows(path, tensors)))


def _rows(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    surface = _embedded(tensors, _EMBEDDINGS[0])
    heads = [v for v in _heads(tensors, "decoder.surf_heads.") if v in surface]
    yield "surface variables", ", ".join(heads)
    yield "static variables", ", ".join(sorted(set(surface) - set(heads)))
    yield "atmospheric variables", ", ".join(_heads(tensors, "decoder.atmos_heads."))
    levels = sorted(
        {n.split(".")[3] for n in tensors if n.startswith(f"{_EMBEDDINGS[1]}layers.")}, key=_height
    )
    record = path.with_name(f"{path.name}.json")
    if not levels and record.is_file():
        levels = [str(level) for level in json.loads(record.read_text("utf-8"))["levels"]]
    # Statistics are not in a checkpoint, and the embedding of a level is computed from its height.
    yield "levels (hPa)", ", ".join(levels) or "not in the file: any that have statistics"
    embedding = next(t for name, t in tensors.items() if _is_embedding(name))
    yield "embedding", f"{embedding.shape[0]} wide, patches of {embedding.shape[-1]}"
    yield "history", f"{embedding.shape[2]} steps"
    for part in ("encoder", "decoder"):
        start = f"backbone.{part}_layers."
        blocks = {
            tuple(n.split(".")[2:5:2]) for n in tensors if f"{start}" in n and ".blocks." in n
        }
        depths = [sum(layer == i for layer, _ in blocks) for i in sorted({b[0] for b in blocks})]
        yield f"{part} blocks", ", ".join(map(str, depths))
    yield "LoRA", "yes" if any(".lora_" in name for name in tensors) else "no"
    yield "parameters", f"{sum(tensor.numel() for tensor in tensors.values()):,}"
    yield "tensors", f"{len(tensors):,}"


def _share_static_z(state: dict[str, Tensor]) -> None:
    """Gives z and static_z one embedding: they see the same field, and upstream reads one for both.

    What the model computes is as before, to the bit where they were equal, as in upstream's own.
    """
    for name in [name for name in state if name.endswith(".weights.static_z")]:
        if (z := f"{name.removesuffix('static_z')}z") in state:
            state[z] = state[name] = (state[z] + state[name]) / 2


def _check_readable(state: dict[str, Tensor], options: AuroraOptions) -> None:
    """Refuses an export whose weights `load_checkpoint_local` would change or not take.

    Raises:
        ConfigError: with what it changes.
    """
    try:
        kind = model_class(options)
        read = _adapt(dict(state), options, argument(options, "patch_size"), kind)
        changed = [n for n, t in state.items() if n not in read or not torch.equal(read[n], t)]
    except KeyError as error:
        changed = [str(error.args[0])]
    if changed:
        raise ConfigError(
            f"model.options: {options.model_class}'s load_checkpoint_local must read the weights"
            f" back as they are; got others in {len(changed)} tensors, first {changed[0]}; leave"
            " arguments.simulate_indexing_bug and level_condition as the class has them"
        )


def _adapt(
    tensors: dict[str, Tensor], options: AuroraOptions, patch_size: int, kind: type[aurora.Aurora]
) -> dict[str, Tensor]:
    """What a class's `load_checkpoint_local` makes of a file's tensors."""
    names = default_variables(options)
    stand_in = SimpleNamespace(patch_size=patch_size, **names)
    return cast(Any, kind)._adapt_checkpoint(stand_in, tensors)


def _is_air_pollution(options: AuroraOptions) -> bool:
    return model_class(options) is aurora.AuroraAirPollution


def _has_no_levels(tensors: Mapping[str, Tensor]) -> bool:
    return not any(n.startswith(_EMBEDDINGS[1][:-1]) and ".layers." in n for n in tensors)


def _spread_over_levels(tensors: Mapping[str, Tensor], levels: Sequence[str]) -> dict[str, Tensor]:
    """Embeddings and heads of all levels together as those of each."""
    spread: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_EMBEDDINGS[1]):
            first, rest = _EMBEDDINGS[1][:-1], name.removeprefix(_EMBEDDINGS[1])
        elif name.startswith("decoder.atmos_heads."):
            first, _, rest = name.rpartition(".")
        else:
            spread[name] = tensor
            continue
        spread |= {f"{first}.layers.{level}.{rest}": tensor for level in levels}
    return spread


def _height(level: str) -> float:
    return float(level.replace("_", "."))


def _embedded(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [n.rpartition(".")[2] for n in tensors if n.startswith(prefix) and ".weights." in n]


def _heads(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    names = (n.removeprefix(prefix).split(".")[0] for n in tensors if n.startswith(prefix))
    return list(dict.fromkeys(names))


def _is_embedding(name: str) -> bool:
    return name.startswith(_EMBEDDINGS) and (".weights." in name or name.endswith(".weight"))


def _flat_tensors(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:
        # Damaged, holding code, or of an old format: the core reads it, and says what is wrong.
        return None
    flat = isinstance(content, Mapping) and content
    if not flat or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return dict(content)


def _record(options: AuroraOptions, variables: Variables) -> dict[str, Any]:
    return {
        "model_class": options.model_class,
        "arguments": {**fixed_arguments(options, variables), **options.arguments},
        "timestep_hours": timestep_hours(options),
        "stabilise_level_agg": stabilised(options),
        "hook": options.hook,
        "max_history_size": argument(options, "max_history_size"),
        "surf_vars": list(variables.surf),
        "static_vars": list(variables.static),
        "atmos_vars": list(variables.atmos),
        "levels": list(options.levels),
        # The argument `surf_stats` of the class.
        "surf_stats": {name: list(pair) for name, pair in variables.given.items()},
        "statistics": {name: pair._asdict() for name, pair in variables.statistics.items()},
        # For aurora.normalisation: locations["w_500"], scales["w_500"].
        "level_statistics": {
            name: {level: pair._asdict() for level, pair in levels.items()}
            for name, levels in variables.levels.items()
        },
    }
