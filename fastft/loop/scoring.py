"""Evaluation of a task on a loader: mean loss and metrics."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from fastft.data import SourceLoader
from fastft.metrics import MeanLoss
from fastft.precision import Precision
from fastft.runtime import rng_state, set_rng_state
from fastft.step import compute_loss
from fastft.task import Batch, Loader, Metric, Task


@torch.no_grad()
def score(
    task: Task, loader: Loader, metrics: Mapping[str, Metric], precision: Precision
) -> dict[str, float]:
    """One pass over a loader in eval mode.

    Returns:
        'loss', a mean over samples (see `MeanLoss`), and what the metrics report.
    """
    mean_loss = MeanLoss()
    for metric in metrics.values():
        metric.reset()
    with evaluating(task.model):
        for batch in loader.batches():
            _update(task, batch, metrics, precision, mean_loss)
    values = {"loss": mean_loss.compute()}
    for metric in metrics.values():
        values.update(metric.compute())
    return values


@torch.no_grad()
def try_evaluation(
    task: Task, loader: SourceLoader, metrics: Mapping[str, Metric], precision: Precision
) -> dict[str, float]:
    """Evaluates a batch of each data set, so that what is wrong with it shows before the first step
    and not after the last. Leaves metrics, modes and random generators as they were.

    Returns:
        What evaluations will report, with the values of these batches.
    """
    generators = rng_state(precision.device)
    for metric in metrics.values():
        metric.reset()
    mean_loss = MeanLoss()
    with evaluating(task.model):
        for batch in loader.examples():
            _update(task, batch, metrics, precision, mean_loss)
    values = {"loss": mean_loss.compute()}
    for metric in metrics.values():
        values.update(metric.compute())
        metric.reset()
    set_rng_state(generators, precision.device)
    return values


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _update(
    task: Task,
    host_batch: Batch,
    metrics: Mapping[str, Metric],
    precision: Precision,
    mean_loss: MeanLoss,
) -> None:
    batch = host_batch.to(precision.device)
    loss = compute_loss(task.loss, task.model, batch, precision)
    mean_loss.update(loss, batch.size)
    for metric in metrics.values():
        metric.update(loss.predictions, batch)
