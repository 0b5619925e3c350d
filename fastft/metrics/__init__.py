"""What is measured and where it is written: evaluation metrics, JSON lines, TensorBoard."""

from fastft.metrics.scores import MeanLoss, make_metrics
from fastft.metrics.writer import MetricWriter, open_writer, write_events

__all__ = ["MeanLoss", "MetricWriter", "make_metrics", "open_writer", "write_events"]
