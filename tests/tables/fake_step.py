"""A training step on fake tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.blocks import BlockForwards, compile_task
from fastft.config import GradientsConfig, RunConfig
from fastft.memory.fake import FakeMeter, fake_batch, make_fake
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.runfile import parse
from fastft.step import TrainingStep
from fastft.task import Batch, Loss, Task, repeated_blocks

CONFIG = parse(
    RunConfig,
    {
        "run": {"folder": "run", "steps": 2},
        "model": {"adapter": "python"},
        "data": {"batch_size": 8, "train": [{"path": "train.npz"}]},
        "optim": {"lr": 1e-2},
    },
)


def mean_square(model: nn.Module, batch: Batch) -> Loss:
    return Loss(model(batch["inputs"]).float().square().mean())


def make_fake_step(
    model: nn.Module, inputs: Tensor, mode: Any, meter: FakeMeter, micro_batches: int = 1
) -> tuple[TrainingStep, BlockForwards, Sequence[Batch]]:
    """The step in bf16, how its blocks run, and its batches; inside of `on_fake_tensors`."""
    task = Task(model, mean_square, repeated_blocks(model))
    make_fake(model, mode, meter)
    precision = make_precision("bf16", torch.device("cpu"))
    forwards = compile_task(task, "off", precision)
    optimizer = Optimizer(make_groups(task, CONFIG.optim, {}), CONFIG.optim, 2)
    step = TrainingStep(task, optimizer, None, GradientsConfig(), precision)
    batches = [fake_batch(Batch({"inputs": inputs}, len(inputs)), mode, meter)] * micro_batches
    return step, forwards, batches
