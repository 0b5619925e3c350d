"""What is fine-tuned: the model, its checkpoint, and what of it is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastft.config.base import Count, Fraction, Patterns, Positive, describe, strict


@dataclass(frozen=True, kw_only=True, config=strict)
class ModelConfig:
    """Which model, and the checkpoint that fine-tuning starts from."""

    adapter: Annotated[str, describe("Adapter name: 'timm', 'python', ...")]
    checkpoint: Annotated[
        Path | None, describe("Pretrained weights; absent: start from random weights.")
    ] = None
    strict: Annotated[
        bool, describe("Every tensor of model and checkpoint must match, new heads aside.")
    ] = True
    min_coverage: Annotated[
        Fraction,
        describe("With strict = false: the least share of the model's values that must load."),
    ] = 0.5
    options: Annotated[dict[str, Any], describe("The adapter's own settings.")] = Field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True, config=strict)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) through peft."""

    rank: Annotated[Count, describe("Rank of the update.")] = 8
    alpha: Annotated[Positive, describe("The update is scaled by alpha / rank.")] = 16
    dropout: Annotated[float, describe("Dropout before the update.", ge=0, lt=1)] = 0.0
    targets: Annotated[
        Patterns, describe("Name globs of the linear or convolution modules to adapt.")
    ] = ("*",)


@dataclass(frozen=True, kw_only=True, config=strict)
class NewHead:
    """How a head that the checkpoint must not fill starts."""

    init: Annotated[
        Literal["random", "zero", "inherit"],
        describe("'zero' zeroes the head's last layer; 'inherit' copies another head."),
    ] = "random"
    source: Annotated[
        str | None, describe("With 'inherit': module name in the checkpoint to copy from.")
    ] = None


def random_heads(new_heads: Mapping[str, NewHead]) -> list[str]:
    """Names of those that start at random."""
    return [name for name, head in new_heads.items() if head.init == "random"]


@dataclass(frozen=True, kw_only=True, config=strict)
class Unfreeze:
    """Parameters that start frozen and are trained from a step on."""

    at_step: Annotated[int, describe("First step that trains them.", ge=0)]
    match: Annotated[Patterns, describe("Name globs of parameters.")]


@dataclass(frozen=True, kw_only=True, config=strict)
class FinetuneConfig:
    """What is trained."""

    method: Annotated[
        Literal["full", "heads", "probe", "lora"],
        describe(
            "'full': everything; 'heads': only the modules in `heads`; 'probe': only the new"
            " heads, encoder frozen in eval mode; 'lora': low-rank updates and new heads."
        ),
    ] = "full"
    heads: Annotated[
        tuple[str, ...], describe("Module names trained by 'heads'; default: the new heads.")
    ] = ()
    new_heads: Annotated[
        dict[str, NewHead], describe("Module name -> how it starts, instead of the checkpoint.")
    ] = Field(default_factory=dict)
    freeze: Annotated[tuple[str, ...], describe("Name globs of parameters to freeze.")] = ()
    freeze_types: Annotated[
        tuple[str, ...], describe("Class names of modules to freeze, such as 'BatchNorm2d'.")
    ] = ()
    unfreeze: Annotated[
        tuple[Unfreeze, ...], describe("Stages at which frozen parameters start to train.")
    ] = ()
    lora: Annotated[LoraConfig, describe("Settings of method = 'lora'.")] = LoraConfig()
