"""Optimizer, parameter groups and schedule."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fastft.config.base import (
    Betas,
    Count,
    DecayRate,
    Fraction,
    NonNegative,
    Patterns,
    Positive,
    describe,
    strict,
)


@dataclass(frozen=True, kw_only=True, config=strict)
class ParameterRule:
    """Settings for the parameters that match; the first rule that matches a parameter wins."""

    match: Annotated[Patterns, describe("Name globs of parameters.")]
    lr: Annotated[NonNegative | None, describe("Peak learning rate.")] = None
    weight_decay: Annotated[NonNegative | None, describe("Weight decay.")] = None
    betas: Annotated[Betas | None, describe("Adam's decay rates.")] = None


@dataclass(frozen=True, kw_only=True, config=strict)
class ScheduleConfig:
    """How the learning rate moves: linear warm-up, then the named curve."""

    name: Annotated[
        Literal["constant", "linear", "cosine", "step"], describe("Curve after the warm-up.")
    ] = "cosine"
    warmup_steps: Annotated[int, describe("Steps of linear warm-up from 0.", ge=0)] = 0
    end_factor: Annotated[
        Fraction, describe("linear, cosine: last learning rate over the peak.")
    ] = 0.0
    step_size: Annotated[Count, describe("step: steps between two drops.")] = 1000
    gamma: Annotated[Fraction, describe("step: factor of each drop.")] = 0.1


def _lr_or_preset(schema: dict[str, Any]) -> None:
    schema["required"].remove("lr")
    schema["anyOf"] = [{"required": ["lr"]}, {"required": ["preset"]}]


# A run file may leave the rate to a preset; what is parsed has it.
@dataclass(frozen=True, kw_only=True, config=strict | ConfigDict(json_schema_extra=_lr_or_preset))
class OptimConfig:
    """Optimizer and parameter groups."""

    lr: Annotated[Positive, describe("Peak learning rate.")]
    preset: Annotated[
        str | None,
        describe("A preset of the adapter. What stands beside it wins."),
    ] = None
    name: Annotated[Literal["adamw", "adam", "sgd", "rmsprop"], describe("Optimizer.")] = "adamw"
    weight_decay: Annotated[
        NonNegative, describe("Decoupled in adamw, added to the gradient in the others.")
    ] = 0.0
    betas: Annotated[Betas, describe("adam, adamw: decay rates of the moments.")] = (0.9, 0.999)
    eps: Annotated[Positive, describe("adam, adamw, rmsprop: added to the denominator.")] = 1e-8
    moments: Annotated[
        Literal["fp32", "bf16", "8bit"],
        describe(
            "adam, adamw: how both moments are kept: fp32 (8 bytes per parameter), bf16 with"
            " stochastic rounding (4), or 8 bits per value in blocks of 128 (2)."
        ),
    ] = "fp32"
    momentum: Annotated[DecayRate, describe("sgd, rmsprop.")] = 0.9
    nesterov: Annotated[bool, describe("sgd.")] = False
    alpha: Annotated[DecayRate, describe("rmsprop: decay rate of the squared gradient.")] = 0.99
    decay_norms_and_biases: Annotated[
        bool, describe("Also decay parameters of one dimension: norms and biases.")
    ] = False
    layer_decay: Annotated[
        float | None,
        describe("Factor on the learning rate per layer away from the output.", gt=0, le=1),
    ] = None
    groups: Annotated[tuple[ParameterRule, ...], describe("Rules, first match wins.")] = ()
    schedule: Annotated[ScheduleConfig, describe("Learning-rate schedule.")] = ScheduleConfig()

    def __post_init__(self) -> None:
        """Refuses settings that exclude each other."""
        if self.preset is not None:
            # Run files that are read with the adapters' presets come here without.
            raise ValueError(
                f"preset must be filled in by the adapter; got '{self.preset}' as it was; read the"
                " run file with `presets`"
            )
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; got 0; set it or drop nesterov")
        if self.name not in ("adam", "adamw") and any(rule.betas for rule in self.groups):
            raise ValueError(f"betas in groups need adam or adamw; got {self.name}; drop them")
        if self.name not in ("adam", "adamw") and self.moments != "fp32":
            raise ValueError(
                f"moments '{self.moments}' need adam or adamw; got {self.name}; drop them"
            )
