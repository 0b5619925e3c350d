"""The run file's metrics, and the mean validation loss: torchmetrics on the device.

Class scores make the host wait for the device at each update. All ranks must call the metrics'
`compute` together: it adds what they counted. `MeanLoss` knows its own rank's batches only.
"""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.config import MetricConfig
from fastft.errors import ConfigError, DataError
from fastft.operands import misfit, pick_operands, same_shape, unique_names, without_axis
from fastft.task import Batch, Loss, Metric

if TYPE_CHECKING:
    import torchmetrics

# torchmetrics is imported where it is used: that takes seconds, which every command would wait.
_MEAN_ERRORS = {
    "mae": ("MeanAbsoluteError", {}),
    "rmse": ("MeanSquaredError", {"squared": False}),
}
_CLASS_SCORES = {
    "accuracy": "Accuracy",
    "f1": "F1Score",
    "precision": "Precision",
    "recall": "Recall",
    "iou": "JaccardIndex",
    # Over all pixels, Dice is F1.
    "dice": "F1Score",
}


def make_metrics(configs: Sequence[MetricConfig], device: torch.device) -> dict[str, Metric]:
    """One metric per entry, by its name; a name that occurs twice is followed by the key of its
    prediction or target: `f1/mask`.

    Raises:
        ConfigError: a mean error with settings of class scores.
    """
    problems: list[str] = []
    metrics: dict[str, Metric] = {}
    for config, name in zip(configs, unique_names(configs), strict=True):
        if config.name in _CLASS_SCORES:
            metrics[name] = ClassScore(config, name, device)
            continue
        if config.per_class or config.average or config.ignore_index is not None:
            problems.append(
                f"metric '{name}': has no classes, so per_class, average and ignore_index must be"
                " absent; got one of them; remove it"
            )
        metrics[name] = MeanError(config, name, device)
    if problems:
        raise ConfigError(problems)
    return metrics


class MeanLoss:
    """Mean of batch losses, weighted by the batches' sizes; NaN before the first update.

    Of losses with several terms (see `Loss.term`) it is the sum of each term's mean.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}

    def update(self, loss: Loss, size: int) -> None:
        """Adds a batch's loss, a mean over `size` samples."""
        # fp64: evaluation may add many small numbers, and a scalar costs nothing.
        self._sums[loss.term] = self._sums.get(loss.term, 0) + loss.total.detach().double() * size
        self._sizes[loss.term] = self._sizes.get(loss.term, 0) + size

    def compute(self) -> float:
        """The mean; waits for the device."""
        means = [total.item() / self._sizes[term] for term, total in self._sums.items()]
        return sum(means) if means else math.nan


class MeanError:
    """Mean absolute or root mean squared error over all values."""

    def __init__(self, config: MetricConfig, name: str, device: torch.device) -> None:
        self._config, self._name = config, name
        kind, settings = _MEAN_ERRORS[config.name]
        metric = getattr(_torchmetrics(), kind)(**settings)
        # fp64: the sums may run over billions of values.
        self._metric = metric.set_dtype(torch.float64).to(device)

    def update(self, predictions: Any, batch: Batch, /) -> None:
        """Adds a batch; one size-1 axis, second or last, may be on one side only."""
        where = f"metric '{self._name}'"
        operands = pick_operands(self._config, predictions, batch.data, where)
        prediction, target = same_shape(*operands, where)
        # Flat, because torchmetrics takes a `view`, which strided outputs refuse.
        self._metric.update(prediction.double().reshape(-1), target.double().reshape(-1))

    def compute(self) -> Mapping[str, float]:
        """The error in the target's unit."""
        return {self._name: self._metric.compute().item()}

    def reset(self) -> None:
        """Forgets all batches."""
        self._metric.reset()


class ClassScore:
    """torchmetrics' accuracy, F1, precision, recall, IoU or Dice over all samples and pixels.

    The first batch decides the task:
        multiclass: prediction [B, C, ...], target [B, ...]; the largest logit wins.
        multilabel: both [B, L], L > 1; each label is a yes or no at logit 0.
        binary: prediction [B, 1, ...], or of the target's shape otherwise; each value is a yes or
            no at logit 0, and `average` does not matter.

    'macro' leaves out classes that neither occur nor are predicted. A class whose label is ignored
    but which is predicted counts there as 0, except in 'iou'. A score without a case is 0.
    """

    def __init__(self, config: MetricConfig, name: str, device: torch.device) -> None:
        self._config, self._name, self._device = config, name, device
        self._case: tuple[str, int] | None = None
        self._scores = _torchmetrics().MetricCollection({})

    def update(self, predictions: Any, batch: Batch, /) -> None:
        """Counts a batch.

        Raises:
            DataError: shapes do not fit, or labels lie outside the classes.
        """
        where = f"metric '{self._name}'"
        prediction, target = pick_operands(self._config, predictions, batch.data, where)
        shape = prediction.shape
        prediction, target = without_axis(prediction, target), without_axis(target, prediction)
        if prediction.shape == target.shape:
            case = ("multilabel", shape[1]) if len(shape) == 2 and shape[1] > 1 else ("binary", 2)
            # As 0 and 1, because torchmetrics takes logits within [0, 1] for probabilities.
            prediction = (prediction > 0).long()
        elif shape[:1] + shape[2:] == target.shape:
            case = ("multiclass", shape[1])
        else:
            wanted = "be [B, C, ...] and [B, ...], or of one shape"
            raise DataError(misfit(prediction, target, where, wanted))
        if self._case is None:
            self._case, self._scores = case, self._make_scores(*case)
        elif case != self._case:
            wanted = f"stay {self._case[0]} with {self._case[1]} classes, as in the first batch"
            raise DataError(misfit(prediction, target, where, wanted))
        labels = self._checked(target, case[1] if case[0] == "multiclass" else 2, where)
        try:
            with _native_bincount():
                self._scores.update(prediction, labels)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None

    def compute(self) -> Mapping[str, float]:
        """The score under the metric's name and, with `per_class`, `<name>/class_<i>`."""
        name = self._name
        if self._case is None:
            got = "needs a batch; got none; give every rank evaluation data"
            raise DataError(f"metric '{name}': {got}")
        scores = self._scores.compute()
        each = scores["each"].tolist() if self._config.per_class else []
        by_class = {f"{name}/class_{i}": value for i, value in enumerate(each)}
        return {name: scores["average"].item(), **by_class}

    def reset(self) -> None:
        """Forgets all batches; task and number of classes stay."""
        self._scores.reset()

    def _make_scores(self, task: str, classes: int) -> "torchmetrics.MetricCollection":
        config, library = self._config, _torchmetrics()
        make = getattr(library, _CLASS_SCORES[config.name])
        sizes = {"num_classes": classes, "num_labels": classes, "ignore_index": config.ignore_index}
        average = config.average or ("micro" if config.name == "accuracy" else "macro")
        scores = {"average": make(task=task, average=average, **sizes)}
        if config.per_class:
            # torchmetrics has no scores per class for its binary task.
            task = "multiclass" if task == "binary" else task
            scores["each"] = make(task=task, average=None, **sizes)
        return library.MetricCollection(scores).to(self._device)

    def _checked(self, target: Tensor, classes: int, where: str) -> Tensor:
        """Labels as int64. torchmetrics takes fractions and, in 'micro', labels of no class."""
        labels = target.long()
        # A NaN or a fraction differs from its integer.
        wrong = (labels != target) | (labels < 0) | (labels >= classes)
        if self._config.ignore_index is not None:
            wrong &= labels != self._config.ignore_index
        if count := int(wrong.sum()):
            raise DataError(
                f"{where}: labels in '{self._config.target}' must be whole numbers from 0 to"
                f" {classes - 1}; got {count} others; set ignore_index or correct the data"
            )
        return labels


def _torchmetrics() -> Any:
    return importlib.import_module("torchmetrics")


@contextmanager
def _native_bincount() -> Iterator[None]:
    """In deterministic mode torchmetrics counts N labels of C classes through an int64 matrix
    [N, C^2]; torch counts integers exactly in any order.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
