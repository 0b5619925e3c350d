"""Loss terms and penalties."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastft.config.base import Fraction, NonNegative, Patterns, Positive, describe, strict


@dataclass(frozen=True, kw_only=True, config=strict)
class LossTermBase:
    """What every loss term has."""

    weight: Annotated[float, describe("Factor in the sum.")] = 1.0
    prediction: Annotated[
        str | None, describe("Key of the model's output, where that is a mapping.")
    ] = None
    target: Annotated[str, describe("Field of the batch to compare with.")] = "targets"


@dataclass(frozen=True, kw_only=True, config=strict)
class CrossEntropy(LossTermBase):
    """Cross entropy of logits `[B, C, ...]` with class indices `[B, ...]`."""

    name: Literal["cross_entropy"] = "cross_entropy"
    class_weights: Annotated[tuple[NonNegative, ...] | None, describe("One factor per class.")] = (
        None
    )
    label_smoothing: Annotated[Fraction, describe("Share spread evenly over classes.")] = 0.0
    ignore_index: Annotated[int, describe("Label that does not count.")] = -100


@dataclass(frozen=True, kw_only=True, config=strict)
class MeanSquaredError(LossTermBase):
    """Mean squared error."""

    name: Literal["mse"] = "mse"


@dataclass(frozen=True, kw_only=True, config=strict)
class MeanAbsoluteError(LossTermBase):
    """Mean absolute error."""

    name: Literal["mae"] = "mae"


@dataclass(frozen=True, kw_only=True, config=strict)
class Huber(LossTermBase):
    """Huber loss: quadratic to `delta`, linear beyond (Huber 1964)."""

    name: Literal["huber"] = "huber"
    delta: Annotated[Positive, describe("Where it turns linear, in target units.")] = 1.0


@dataclass(frozen=True, kw_only=True, config=strict)
class BinaryCrossEntropy(LossTermBase):
    """Binary cross entropy of logits; targets in [0, 1], negative ones do not count."""

    name: Literal["bce"] = "bce"
    positive_weight: Annotated[Positive, describe("Factor of positive targets.")] = 1.0


@dataclass(frozen=True, kw_only=True, config=strict)
class Dice(LossTermBase):
    """Soft Dice loss (Milletari et al. 2016, arXiv 1606.04797) of logits."""

    name: Literal["dice"] = "dice"
    smooth: Annotated[Positive, describe("Added to numerator and denominator.")] = 1.0
    ignore_index: Annotated[int, describe("Label that does not count.")] = -100


@dataclass(frozen=True, kw_only=True, config=strict)
class Focal(LossTermBase):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002) of logits."""

    name: Literal["focal"] = "focal"
    gamma: Annotated[NonNegative, describe("Exponent of (1 - p).")] = 2.0
    class_weights: Annotated[tuple[NonNegative, ...] | None, describe("One factor per class.")] = (
        None
    )
    ignore_index: Annotated[int, describe("Label that does not count.")] = -100


@dataclass(frozen=True, kw_only=True, config=strict)
class PythonLoss(LossTermBase):
    """A user's own function `(prediction, target) -> scalar tensor`."""

    file: Annotated[Path, describe("Python file.")]
    name: Literal["python"] = "python"
    function: Annotated[str, describe("Function in that file.")] = "loss"


LossTerm = Annotated[
    CrossEntropy
    | MeanSquaredError
    | MeanAbsoluteError
    | Huber
    | BinaryCrossEntropy
    | Dice
    | Focal
    | PythonLoss,
    Field(discriminator="name"),
]


@dataclass(frozen=True, kw_only=True, config=strict)
class Penalty:
    """`weight * sum |w|` (l1) or `weight * sum w^2` (l2) over the matched parameters."""

    kind: Literal["l1", "l2"]
    match: Annotated[Patterns, describe("Name globs of parameters.")]
    weight: Annotated[Positive, describe("Factor.")]


@dataclass(frozen=True, kw_only=True, config=strict)
class LossConfig:
    """The sum of terms that is minimised. Adapters with a loss of their own need no terms."""

    terms: Annotated[tuple[LossTerm, ...], describe("Terms of the sum.")] = ()
    penalties: Annotated[tuple[Penalty, ...], describe("Terms on parameters.")] = ()
