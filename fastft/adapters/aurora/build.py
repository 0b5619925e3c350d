"""Making an Aurora model that the trainer can compile, plan and freeze."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import aurora
import torch
from aurora.model.lora import LoRA
from torch import nn

from fastft.adapters.aurora.blocks import prepare_blocks
from fastft.adapters.aurora.forward import remove_waits
from fastft.adapters.aurora.options import AuroraOptions
from fastft.adapters.aurora.patches import chunk_patches, rewrite_for_compilers
from fastft.adapters.aurora.variables import Variables, resolve_variables
from fastft.adapters.aurora.variants import AirPollution, V1p5, Wave, Weather
from fastft.config import NewHead
from fastft.errors import AdapterError, ConfigError, nearest
from fastft.names import first_few, is_under

CLASSES = (
    "Aurora",
    "AuroraPretrained",
    "AuroraSmallPretrained",
    "AuroraSmall",
    "Aurora12hPretrained",
    "AuroraHighRes",
    "AuroraAirPollution",
    "AuroraWave",
    "AuroraV1p5",
)
_V1P5 = "leave it out: AuroraV1p5 sets it"
# Without what a wave is told by, upstream's hook fails.
_WAVES = (
    *("swh", "mwd", "mwp", "pp1d", "shww", "mdww", "mpww", "shts", "mdts"),
    *("swh1", "mwd1", "mwp1", "swh2", "mwd2", "mwp2"),
)
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
    "stochastic": "leave it out: ensembles are not supported",
    "output_only_surf_vars": _V1P5,
    "output_only_atmos_vars": _V1P5,
    "modulation_heads": "leave it out: AuroraAirPollution sets it",
    "atmos_static_vars": "leave it out: AuroraAirPollution sets it",
}


def model_class(options: AuroraOptions) -> type[aurora.Aurora]:
    """The class that `model.options.model_class` names.

    Raises:
        ConfigError: there is no such class, or it is not supported.
    """
    name = options.model_class
    if name == "AuroraV1p5Ensemble":
        raise ConfigError(
            f"model.options.model_class: must be one of {', '.join(CLASSES)}; got '{name}', whose"
            " loss, over several members, this adapter does not have; choose another class"
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
    usual = default_variables(options)
    return resolve_variables(
        usual, {kind: getattr(options, kind) for kind in usual}, options.levels
    )


def default_variables(options: AuroraOptions) -> dict[str, tuple[str, ...]]:
    """'surf_vars', 'static_vars', 'atmos_vars' -> the class's names."""
    defaults = _defaults(model_class(options))
    return {kind: defaults[kind] for kind in ("surf_vars", "static_vars", "atmos_vars")}


def make_variant(options: AuroraOptions, variables: Variables) -> Weather:
    """What the class takes and what its loss compares.

    Raises:
        ConfigError: `masked` names no predicted variable, or the class lacks variables of its own.
    """
    predicted = [*variables.surf, *variables.atmos]
    problems = [
        f"model.options.masked: '{name}' must be a predicted variable; it is"
        f" none{nearest(name, predicted)}"
        for name in options.masked
        if name not in predicted
    ]
    kind = model_class(options)
    if kind is aurora.AuroraWave and (lacking := sorted(set(_WAVES) - set(variables.surf))):
        problems.append(
            f"model.options.surf_vars: must hold all waves of AuroraWave; got none named"
            f" {', '.join(lacking)}; name them, or give new variables in a table"
        )
    lora = kind is aurora.AuroraAirPollution and argument(options, "use_lora")
    if lora and "so2" not in variables.atmos:
        problems.append(
            "model.options.atmos_vars: must hold so2 with use_lora = true, since AuroraAirPollution"
            " bounds it; got none; name it"
        )
    if problems:
        raise ConfigError(problems)
    if kind is aurora.AuroraAirPollution:
        return AirPollution(variables, options.masked)
    if kind is aurora.AuroraWave:
        densities, angles = (
            argument(options, f"{name}_surf_vars") for name in ("density_channel", "angle")
        )
        masked = [name for name in options.masked if name not in densities]
        return Wave(variables, masked, densities=densities, angles=angles)
    if kind is aurora.AuroraV1p5:
        output_only = argument(options, "output_only_surf_vars")
        return V1p5(variables, options.masked, output_only=output_only)
    return Weather(variables, options.masked)


def fixed_arguments(options: AuroraOptions, variables: Variables) -> dict[str, Any]:
    """Arguments of the constructor that the class has otherwise by default.

    The trainer's autocast stands for AuroraV1p5's own, which is float16 on a GPU.
    """
    if model_class(options) is not aurora.AuroraV1p5:
        return {}
    output_only = argument(options, "output_only_surf_vars")
    return {
        "autocast": False,
        "use_fp16_safe_attention": False,
        # It makes channels of all of them, whether the model has them or not.
        "output_only_surf_vars": tuple(n for n in output_only if n in variables.surf),
    }


def build_model(options: AuroraOptions, variables: Variables) -> aurora.Aurora:
    """The model on the CPU with fresh weights; upstream's class and forward as they are.

    Raises:
        ConfigError: arguments that the class does not take.
        AdapterError: the class cannot be made with them.
    """
    arguments = constructor_arguments(options) | fixed_arguments(options, variables)
    arguments |= {
        "surf_vars": variables.surf,
        "static_vars": variables.static,
        "atmos_vars": variables.atmos,
        "surf_stats": {name: tuple(pair) for name, pair in variables.given.items()},
        "stabilise_level_agg": stabilised(options),
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
    chunk_patches(model, options.chunk_patches)
    rewrite_for_compilers(model)
    remove_waits(model)
    prepare_blocks(model, options.autocast)
    return model


def timestep_hours(options: AuroraOptions) -> float:
    """The lead time of a step."""
    default: timedelta = _defaults(model_class(options))["timestep"]
    return options.timestep_hours or default.total_seconds() / 3600


def stabilised(options: AuroraOptions) -> bool:
    """Whether keys and queries are normalised where levels are aggregated."""
    default: bool = _defaults(model_class(options))["stabilise_level_agg"]
    return default if options.stabilise_level_agg is None else options.stabilise_level_agg


def new_parameters(model: nn.Module, variables: Variables) -> dict[str, nn.Parameter]:
    """Embeddings and heads of the variables that the class does not have by default."""
    surf, static, atmos = (variables.new[f"{kind}_vars"] for kind in ("surf", "static", "atmos"))
    # As AuroraWave and AuroraAirPollution name what they make of a variable.
    surf |= {f"{name}_{channel}" for name in surf for channel in ("sin", "cos", "density")}
    atmos |= {f"static_{name}" for name in static}
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


def heads(model: nn.Module, variables: Variables, place: str = "") -> list[str]:
    """What belongs to new variables, else the heads of all; `place`: before the model's names."""
    usual = ["decoder.surf_heads", "decoder.atmos_heads"]
    return [f"{place}{name}" for name in new_parameters(model, variables) or usual]


def low_rank(model: nn.Module) -> list[str]:
    """Parameters of upstream's own low-rank updates (`arguments.use_lora`)."""
    return [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, LoRA)
        for part, _ in module.named_parameters(recurse=False)
    ]


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


def told_step(options: AuroraOptions) -> Callable[[int], int]:
    """Roll-out step -> the first at which the model computes as it does there.

    It is told that one, since compiled blocks are compiled anew for each that they are told.
    """
    names = ("use_lora", "lora_mode", "lora_steps", "positive_surf_vars", "positive_atmos_vars")
    lora, mode, most, *positive = (argument(options, name) for name in names)
    from_second = any(positive) or (lora and mode == "from_second")

    def told(step: int) -> int:
        if lora and (step >= most or mode == "all"):
            return min(step, most)
        return min(step, 1) if from_second else 0

    return told


def low_rank_notes(options: AuroraOptions) -> list[str]:
    """Says so where no step of a sample has gradients of upstream's low-rank updates."""
    lora, mode = (argument(options, name) for name in ("use_lora", "lora_mode"))
    if not lora or mode != "from_second" or options.rollout_steps > 1:
        return []
    return [
        "low-rank updates count from the second step of a roll-out on (lora_mode = 'from_second'):"
        " rollout_steps = 1 does not train them; set it to 2, and with data.replay"
        " loss.pushforward = true"
    ]


def embedding_notes(
    embeddings: Iterable[str], options: AuroraOptions, new_heads: Mapping[str, NewHead]
) -> list[str]:
    """Says so where `finetune.new_heads` and `new_embeddings` have embeddings start otherwise.

    Args:
        embeddings: names of the embeddings of new variables.
        new_heads: the run file's.
    """
    zero, others = [], []
    for name in embeddings:
        # A head inside another one has the last word.
        inner = max((head for head in new_heads if is_under(name, [head])), key=len, default=None)
        if inner is None:
            continue
        if options.new_embeddings == "zero" and new_heads[inner].init == "random":
            zero.append(name)
        elif options.new_embeddings == "random" and new_heads[inner].init != "random":
            others.append(name)
    notes = []
    if zero:
        notes.append(
            f"{first_few(zero, 1)}: at zero, by model.options.new_embeddings, where"
            " finetune.new_heads has init = 'random'; for that, set new_embeddings = 'random'"
        )
    if others:
        notes.append(
            f"{first_few(others, 1)}: as finetune.new_heads says, over"
            " model.options.new_embeddings = 'random'"
        )
    return notes


def longest_carried(options: AuroraOptions) -> int | None:
    """Steps that a replay buffer may carry samples on for low-rank updates to be trained alone.

    Upstream's do not count from `lora_steps` on. None: there are none.
    """
    if not argument(options, "use_lora"):
        return None
    # With push-forward the last of a sample's steps is the one that is trained on.
    further = options.rollout_steps - 1 if options.loss.pushforward else 0
    return argument(options, "lora_steps") - further
