"""The seam between fastft and a model family: types only.

An adapter (see `Adapter`) turns its options into a `Task`: the model, the loss that training
minimises and evaluation reports, and what the core must know to compile, freeze, check and
measure it. CONTRIBUTING.md ("Writing an adapter") walks through one.
"""

from fastft.task.adapter import Adapter, Conversion, Description
from fastft.task.data import (
    Batch,
    CheckData,
    DataCheck,
    Dataset,
    FieldSpec,
    Finding,
    Loader,
    NamedDataset,
    Sample,
    Split,
)
from fastft.task.loss import Carry, Criterion, Loss, LossFunction, Metric, Report, TextTable
from fastft.task.model import Block, Task, repeated_blocks

__all__ = [
    "Adapter",
    "Batch",
    "Block",
    "Carry",
    "CheckData",
    "Conversion",
    "Criterion",
    "DataCheck",
    "Dataset",
    "Description",
    "FieldSpec",
    "Finding",
    "Loader",
    "Loss",
    "LossFunction",
    "Metric",
    "NamedDataset",
    "Report",
    "Sample",
    "Split",
    "Task",
    "TextTable",
    "repeated_blocks",
]
