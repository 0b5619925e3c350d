"""Adapters by name, imported on demand so that only the family in use must be installed."""

import importlib
from collections.abc import Sequence
from typing import Any, cast

from fastft.config import DataSource, ModelConfig
from fastft.errors import AdapterError, nearest
from fastft.runfile import parse
from fastft.task import Adapter

# Name -> (module, class, extra that installs the upstream package).
ADAPTERS = {
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


def _load(name: str) -> Any:
    if name not in ADAPTERS:
        raise AdapterError(
            f"model.adapter: must be a known adapter; got '{name}'{nearest(name, ADAPTERS)}"
        )
    module, attribute, extra = ADAPTERS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("fastft"):
            raise
        raise AdapterError(
            f"model.adapter: '{name}' needs the package {error.name}; install fastft[{extra}]"
        ) from None
