"""Evaluation of a task on a loader: mean loss and metrics."""

from collections.abc import Mapping

import torch

from fastft.metrics import MeanLoss
from fastft.step import Precision, compute_loss
from fastft.task import Loader, Metric, Task


@torch.no_grad()
def score(
    task: Task, loader: Loader, metrics: Mapping[str, Metric], precision: Precision
) -> dict[str, float]:
    """One pass over a loader in eval mode; the caller puts the model back into train mode.

    Returns:
        'loss', a mean over samples, and what the metrics report.
    """
    task.model.eval()
    mean_loss = MeanLoss(precision.device)
    for metric in metrics.values():
        metric.reset()
    for host_batch in loader.batches():
        batch = host_batch.to(precision.device)
        loss = compute_loss(task.loss, task.model, batch, precision)
        mean_loss.update(loss.total, batch.size)
        for metric in metrics.values():
            metric.update(loss.predictions, batch)
    values = {"loss": mean_loss.compute()}
    for metric in metrics.values():
        values.update(metric.compute())
    return values
