"""Making an Aurora model that the trainer can compile, plan and freeze."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import MethodType
from typing import Any, cast

import aurora
import torch
from aurora.model import swin3d
from torch import Tensor, nn

from fastft.adapters.aurora.forward import remove_waits
from fastft.adapters.aurora.options import AuroraOptions
from fastft.adapters.aurora.variables import Variables, resolve_variables
from fastft.errors import AdapterError, ConfigError, nearest
from fastft.task import Block

CLASSES = (
    "Aurora",
    "AuroraPretrained",
    "AuroraSmallPretrained",
    "AuroraSmall",
    "Aurora12hPretrained",
    "AuroraHighRes",
)
# They post-process what the decoder gives, or take and give further variables: the paper's losses
# for them stand before that.
_NOT_YET = ("AuroraAirPollution", "AuroraWave", "AuroraV1p5", "AuroraV1p5Ensemble")
_V1P5 = "leave it out: only AuroraV1p5 uses it, which is not supported yet"
_POLLUTION = "leave it out: only AuroraAirPollution uses it, which is not supported yet"
# Of the constructor -> what to set instead.
_OWNED = {
    "surf_vars": "set model.options.surf_vars",
    "static_vars": "set model.options.static_vars",
    "atmos_vars": "set model.options.atmos_vars",
    "surf_stats": "give location and scale in model.options.surf_vars",
    "stabilise_level_agg": "set model.options.stabilise_level_agg",
    "timestep": "set model.options.timestep_hours",
    "autocast": "set step.precision and model.options.autocast",
    "autocast_dtype": "set step.precision",
    "bf16_mode": "set step.precision",
    "use_fp16_safe_attention": "set step.precision = 'bf16'",
    "variable_lead_time": _V1P5,
    "stochastic": _V1P5,
    "output_only_surf_vars": _V1P5,
    "output_only_atmos_vars": _V1P5,
    "modulation_heads": _POLLUTION,
    "atmos_static_vars": _POLLUTION,
}


def model_class(options: AuroraOptions) -> type[aurora.Aurora]:
    """The class that `model.options.model_class` names.

    Raises:
        ConfigError: there is no such class, or it is not supported yet.
    """
    name = options.model_class
    if name in _NOT_YET:
        raise ConfigError(
            f"model.options.model_class: must be one of {', '.join(CLASSES)}; got '{name}', whose"
            " own variables, post-processing and loss this adapter does not support yet; choose"
            " another class"
        )
    if name not in CLASSES:
        raise ConfigError(
            f"model.options.model_class: must be a class of the package aurora; got '{name}'"
            f"{nearest(name, CLASSES)}"
        )
    return getattr(aurora, name)


def argument(options: AuroraOptions, name: str) -> Any:
    """What the constructor gets for an argument, or its default."""
    return {**_defaults(model_class(options)), **constructor_arguments(options)}[name]


def constructor_arguments(options: AuroraOptions) -> dict[str, Any]:
    """`model.options.arguments`, checked, with tuples for arrays.

    Raises:
        ConfigError: unknown arguments, and those that have options of their own.
    """
    known = _defaults(model_class(options))
    problems = []
    for name in options.arguments:
        where = f"model.options.arguments.{name}"
        if name in _OWNED:
            problems.append(f"{where}: must be left out; got a value; {_OWNED[name]}")
        elif name not in known:
            free = [argument for argument in known if argument not in _OWNED]
            problems.append(
                f"{where}: must be an argument of {options.model_class}; it is"
                f" none{nearest(name, free)}"
            )
    if problems:
        raise ConfigError(problems)
    return {name: _as_tuple(value) for name, value in options.arguments.items()}


def make_variables(options: AuroraOptions) -> Variables:
    """The run's variables and their statistics.

    Raises:
        ConfigError: see `resolve_variables`.
    """
    defaults = _defaults(model_class(options))
    kinds = ("surf_vars", "static_vars", "atmos_vars")
    return resolve_variables(
        {kind: defaults[kind] for kind in kinds},
        {kind: getattr(options, kind) for kind in kinds},
        options.levels,
    )


def build_model(options: AuroraOptions, variables: Variables) -> aurora.Aurora:
    """The model on the CPU with fresh weights; upstream's class and forward as they are.

    Raises:
        ConfigError: arguments that the class does not take.
        AdapterError: the class cannot be made with them.
    """
    arguments = constructor_arguments(options)
    arguments |= {
        "surf_vars": variables.surf,
        "static_vars": variables.static,
        "atmos_vars": variables.atmos,
        "surf_stats": {name: tuple(pair) for name, pair in variables.given.items()},
        "stabilise_level_agg": options.stabilise_level_agg,
        "timestep": timedelta(hours=timestep_hours(options)),
    }
    variables.register()
    try:
        with warnings.catch_warnings():
            # It warns of statistics that the run file gives on purpose.
            warnings.filterwarnings("ignore", "The normalisation statics")
            model = model_class(options)(**arguments)
    except (AssertionError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise AdapterError(
            f"model.options: {options.model_class} must take these arguments; got"
            f" {type(error).__name__}: {error}; correct model.options.arguments"
        ) from error
    if options.new_embeddings == "zero":
        with torch.no_grad():
            for name, parameter in new_parameters(model, variables).items():
                if name.startswith("encoder."):
                    parameter.zero_()
    remove_waits(model)
    if options.autocast == "backbone":
        _keep_out_of_autocast(model.encoder)
        _keep_out_of_autocast(model.decoder)
    _hold_masks_constant()
    return model


def timestep_hours(options: AuroraOptions) -> float:
    """The lead time of a step."""
    default: timedelta = _defaults(model_class(options))["timestep"]
    return options.timestep_hours or default.total_seconds() / 3600


def new_parameters(model: nn.Module, variables: Variables) -> dict[str, nn.Parameter]:
    """Embeddings and heads of the variables that the class does not have by default."""
    surf, static, atmos = (variables.new[f"{kind}_vars"] for kind in ("surf", "static", "atmos"))
    kinds = {
        "encoder.surf_token_embeds.": surf | static,
        "encoder.atmos_token_embeds.": atmos,
        "decoder.surf_heads.": surf,
        "decoder.atmos_heads.": atmos,
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        for prefix, new in kinds.items()
        if name.startswith(prefix) and new & set(name.split("."))
    }


def heads(model: nn.Module, variables: Variables) -> list[str]:
    """What belongs to new variables, else the heads of all."""
    return list(new_parameters(model, variables)) or ["decoder.surf_heads", "decoder.atmos_heads"]


def blocks(model: aurora.Aurora) -> list[Block]:
    """The Swin blocks in forward order; none changes its sizes from batch to batch."""
    return list(_blocks(model))


def _blocks(model: aurora.Aurora) -> Iterator[Block]:
    for part in ("encoder_layers", "decoder_layers"):
        for i, layer in enumerate(getattr(model.backbone, part)):
            for j, block in enumerate(cast(Any, layer).blocks):
                yield Block(f"backbone.{part}.{i}.blocks.{j}", block)


def _defaults(kind: type[aurora.Aurora]) -> dict[str, Any]:
    """The constructor's arguments and their defaults; subclasses pass on what they do not name."""
    defaults: dict[str, Any] = {}
    for cls in reversed(kind.__mro__):
        if issubclass(cls, aurora.Aurora):
            parameters = inspect.signature(cls.__init__).parameters.values()
            defaults |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return defaults


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_as_tuple(item) for item in value)
    return value


def _keep_out_of_autocast(module: nn.Module) -> None:
    """Runs the module in its weights' precision, whatever autocast is around it.

    aurora's own switches would do the same, but they choose a GPU where there is one, even for a
    model on the CPU, and compiled blocks would be autocast twice.
    """
    forward = cast(Any, module.forward).__func__

    def run(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        weight = next(self.parameters())
        # What the backbone returns is in low precision where autocast covers its last norm.
        whole = [_cast(a, weight.dtype) for a in arguments]
        with torch.autocast(weight.device.type, enabled=False):
            return forward(self, *whole, **keywords)

    # Bound, so that a deep copy of the module computes with the copy's weights.
    module.forward = MethodType(run, module)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value


def _hold_masks_constant() -> None:
    """Makes the attention masks of shifted windows constants of compiled blocks; may be repeated.

    Dynamo ignores the cache of the function that makes them, and traces 27 assignments into every
    shifted block; Inductor makes invalid C++ of them.
    """
    original = swin3d.compute_3d_shifted_window_mask
    if getattr(original, "_held_constant", False):
        return

    # Dynamo does not look at the wrapper of a cache, so a function must call it.
    def mask(*arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **keywords)

    held = torch._dynamo.assume_constant_result(mask)
    cast(Any, held)._held_constant = True
    swin3d.compute_3d_shifted_window_mask = held


def steps_matter(options: AuroraOptions, steps: int) -> bool:
    """Whether the model computes differently at different roll-out steps."""
    chosen: Mapping[str, Any] = {n: argument(options, n) for n in ("use_lora", "lora_mode")}
    lora = chosen["use_lora"] and (
        chosen["lora_mode"] != "single" or steps > argument(options, "lora_steps")
    )
    clamps = argument(options, "positive_surf_vars") or argument(options, "positive_atmos_vars")
    return bool(lora or clamps)
