"""What losses and metrics share: the names of their entries, and the two operands of each."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fastft.errors import ConfigError, DataError, nearest


class Entry(Protocol):
    """A loss term or a metric of the run file."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def prediction(self) -> str | None: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102


def unique_names(entries: Sequence[Entry]) -> list[str]:
    """`mse`; where it occurs twice `mse/energy`; where that occurs twice also `mse/energy/2`."""
    repeated = [entry.name for entry in entries]
    names: list[str] = []
    for entry in entries:
        name = entry.name
        if repeated.count(name) > 1:
            name = f"{name}/{entry.prediction or entry.target}"
        earlier = sum(n == name or n.startswith(f"{name}/") for n in names)
        names.append(f"{name}/{earlier + 1}" if earlier else name)
    return names


def pick_operands(
    entry: Entry, predictions: Any, fields: Mapping[str, Any], where: str, *, free: bool = False
) -> tuple[Any, Any]:
    """The prediction and the target that an entry compares: tensors.

    Args:
        free: they may be of any type, and where no prediction is named it is the whole output.

    Raises:
        ConfigError: the model's output has no such prediction.
        DataError: the batch has no such field, or one of the two is no tensor.
    """
    key = entry.prediction
    if isinstance(predictions, Mapping) and not (free and key is None):
        if key not in predictions:
            got = "none" if key is None else f"'{key}'"
            raise ConfigError(
                f"{where}: `prediction` must name an output of the model; got {got}"
                f"{nearest(key or '', predictions)}"
            )
        predictions = predictions[key]
    elif key is not None:
        raise ConfigError(
            f"{where}: the model must return a mapping with the key '{key}'; got"
            f" {type(predictions).__name__}; remove `prediction`"
        )
    if entry.target not in fields:
        raise DataError(
            f"{where}: the batch must have the field '{entry.target}'; got none"
            f"{nearest(entry.target, fields)}"
        )
    target = fields[entry.target]
    for value, what in ((predictions, "prediction"), (target, f"field '{entry.target}'")):
        if not free and not isinstance(value, Tensor):
            raise DataError(
                f"{where}: {what} must be a tensor; got {type(value).__name__};"
                " name another or convert it"
            )
    return predictions, target


def same_shape(prediction: Tensor, target: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Both in one shape; an axis of size 1 that only one has, second or last, is dropped.

    Raises:
        DataError: their shapes differ otherwise.
    """
    matched = without_axis(prediction, target), without_axis(target, prediction)
    if matched[0].shape != matched[1].shape:
        raise DataError(misfit(prediction, target, where, "have one shape"))
    return matched


def without_axis(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor without its second or last axis of size 1, if that gives the other's shape."""
    if tensor.ndim == other.ndim + 1 > 1:
        for axis in (1, -1):
            if tensor.squeeze(axis).shape == other.shape:
                return tensor.squeeze(axis)
    return tensor


def misfit(prediction: Tensor, target: Tensor, where: str, wanted: str) -> str:
    """The message for two shapes that do not fit."""
    return (
        f"{where}: prediction and target must {wanted}; got {list(prediction.shape)} and"
        f" {list(target.shape)}; reshape one of them"
    )
