"""Adapters by name, imported on demand so that only the family in use must be installed."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tomli_w

from fastft.config import DataSource, FinetuneConfig, ModelConfig, RunConfig
from fastft.errors import AdapterError, ConfigError, nearest
from fastft.runfile import parse
from fastft.task import Adapter

# Name -> (module, class, extra that installs the upstream package).
ADAPTERS = {
    "pet": ("fastft.adapters.pet", "PetAdapter", "pet"),
    "aurora": ("fastft.adapters.aurora", "AuroraAdapter", "aurora"),
    "timm": ("fastft.adapters.timm", "TimmAdapter", "timm"),
    "python": ("fastft.adapters.python", "open_python_adapter", None),
}


def find_adapter(config: ModelConfig) -> Adapter:
    """The adapter that `[model]` names, with its options checked.

    Raises:
        AdapterError: unknown name, or its upstream package is not installed.
        ConfigError: options that the adapter does not take.
    """
    make = _load(config.adapter)
    options = parse(make.Options, config.options, key="model.options")
    return cast(Adapter, make(options))


def compute_statistics(config: ModelConfig, sources: Sequence[DataSource], most: int) -> str:
    """What a data set's values are normalised by, as the part of a run file that says so.

    Args:
        sources: training data sets; one text over all of them is up to the adapter.
        most: samples to read of each.

    Raises:
        AdapterError: the adapter has no such statistics.
    """
    make = _load(config.adapter)
    compute = getattr(make, "statistics", None)
    if compute is None:
        raise AdapterError(
            f"model.adapter: '{config.adapter}' takes no statistics from data; use an adapter that"
            " does, such as 'aurora'"
        )
    return compute(parse(make.Options, config.options, key="model.options"), sources, most)


def convert_options(name: str, path: Path) -> tuple[str, Sequence[str]]:
    """The run file of an options file of a model family's own trainer, and what it says of it.

    Args:
        name: the adapter's.

    Raises:
        AdapterError: unknown adapter, or one that converts none.
        ConfigError: the file cannot be converted.
    """
    make = _load(name, key="--adapter")
    convert = getattr(make, "convert", None)
    if convert is None:
        raise AdapterError(
            f"--adapter: must convert options files; '{name}' does not; use one that does, such as"
            " 'pet'"
        )
    made = convert(path)
    config = parse(RunConfig, made.run, where=str(path))
    parse(make.Options, config.model.options, where=str(path), key="model.options")
    lines = [f"Converted from {path}.", *made.notes]
    head = "".join(f"# {line}\n" for line in lines)
    return f"{head}\n{tomli_w.dumps(made.run)}", made.notes


def optim_preset(
    model: Mapping[str, Any], finetune: Mapping[str, Any], name: str
) -> Mapping[str, Any]:
    """The part of `[optim]` that a preset stands for.

    Args:
        model: `[model]` of the run file.
        finetune: `[finetune]`.

    Raises:
        AdapterError: unknown adapter.
        ConfigError: unknown preset, or a `[model]` or `[finetune]` that cannot be.
    """
    config = parse(ModelConfig, model, key="model")
    new_heads = parse(FinetuneConfig, finetune, key="finetune").new_heads
    make = _load(config.adapter)
    offer = getattr(make, "optim_presets", None)
    known = {}
    if offer is not None:
        known = offer(parse(make.Options, config.options, key="model.options"), config, new_heads)
    if name not in known:
        offered = f"be one of {', '.join(known)}" if known else "be absent, since it has none"
        raise ConfigError(
            f"optim.preset: with the adapter '{config.adapter}' must {offered}; got '{name}'"
            f"{nearest(name, known)}"
        )
    return known[name]


def _load(name: str, key: str = "model.adapter") -> Any:
    if name not in ADAPTERS:
        raise AdapterError(f"{key}: must be a known adapter; got '{name}'{nearest(name, ADAPTERS)}")
    module, attribute, extra = ADAPTERS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("fastft"):
            raise
        raise AdapterError(
            f"{key}: '{name}' needs the package {error.name}; install fastft[{extra}]"
        ) from None
