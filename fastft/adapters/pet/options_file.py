"""The options file of `mtt train`, read and checked as upstream does."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from metatrain.utils.architectures import check_architecture_options, get_default_hypers
from metatrain.utils.pydantic import MetatrainValidationError, validate_base_options
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastft.errors import AdapterError, ConfigError

# Sections that have their place in a run file, or change no result.
BASE = {
    *("architecture", "seed", "device", "base_precision", "training_set", "validation_set"),
    *("test_set", "final_eval", "print_stats"),
}


def read_options(path: Path) -> dict[str, Any]:
    """The file's options, with what they refer to.

    Raises:
        ConfigError: it is no options file of `mtt train`, or has options that upstream refuses.
        AdapterError: it is of another architecture.
    """
    try:
        options: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{path}: must be an options file of metatrain, in YAML; got"
            f" {type(error).__name__}: {error}; check the path"
        ) from error
    architecture = options.get("architecture") if isinstance(options, dict) else None
    if not isinstance(architecture, dict) or "training_set" not in options:
        raise ConfigError(
            f"{path}: must be an options file of `mtt train`, with `architecture` and"
            " `training_set`; got another file"
        )
    if architecture.get("name") != "pet":
        raise AdapterError(
            f"{path}: architecture.name: must be 'pet'; got '{architecture.get('name')}'; train it"
            " with upstream"
        )
    if problems := _invalid(options):
        raise ConfigError(f"{path}: {problem}" for problem in problems)
    return options


def _invalid(options: Mapping[str, Any]) -> list[str]:
    """What upstream does not take."""
    usual, given = get_default_hypers("pet"), options["architecture"]
    try:
        validate_base_options(copy.deepcopy({k: v for k, v in options.items() if k in BASE}))
    except MetatrainValidationError as error:
        return _problems(error, options)
    training = given.get("training", {})
    tuned = training.get("finetune")
    method = tuned.get("method", "full") if isinstance(tuned, dict) and tuned else "no"
    merged: Any = OmegaConf.merge(usual, given)
    try:
        check_architecture_options("pet", cast(Any, OmegaConf.to_container(merged)))
    except MetatrainValidationError as error:
        # One of these classes is meant.
        kinds = {f"{kind}FinetuneHypers" for kind in ("No", "Full", "LoRa", "Heads")}
        kinds = {kind for kind in kinds if not kind.lower().startswith(method)}
        error.errors = [e for e in error.errors if not kinds.intersection(map(str, e["loc"]))]
        return _problems(error, given, "architecture.")
    return []


def _problems(
    error: MetatrainValidationError, options: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """One for each option that is wrong."""
    problems: dict[str, str] = {}
    for each in error.errors:
        node: Any = options
        names = []
        # Between the names are those of upstream's types.
        for part in each["loc"]:
            listed = isinstance(node, list) and isinstance(part, int)
            if listed or (isinstance(node, dict) and part in node):
                node = node[part]
                names.append(str(part))
        if each["type"] == "missing":
            names.append(str(each["loc"][-1]))
        where = prefix + ".".join(names)
        text = f"{where}: must be as metatrain takes it; got {each['input']!r} ({each['msg']})"
        problems.setdefault(where, f"{text}; correct it")
    # Of something nested, every type that it may have says that it is not that.
    return [
        problem
        for where, problem in problems.items()
        if not any(other.startswith(f"{where}.") for other in problems)
    ]
