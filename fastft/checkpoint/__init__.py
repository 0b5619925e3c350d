"""Checkpoints: reading anyone's weights, loading them into a model, saving and resuming a run."""

from fastft.checkpoint.folder import (
    Saved,
    best_checkpoint,
    is_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_meta,
)
from fastft.checkpoint.heads import start_as
from fastft.checkpoint.load import LoadReport, load_weights
from fastft.checkpoint.read import Weights, read_weights
from fastft.checkpoint.save import save_checkpoint
from fastft.checkpoint.show import describe_checkpoint

__all__ = [
    "LoadReport",
    "Saved",
    "Weights",
    "best_checkpoint",
    "describe_checkpoint",
    "is_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_weights",
    "read_meta",
    "read_weights",
    "save_checkpoint",
    "start_as",
]
