"""A small task with blocks, and what plans of it are made from."""

import io
from typing import cast

import torch
from rich.console import Console
from torch import nn

from fastft.blocks import BlockForwards
from fastft.config import GradientsConfig, OptimConfig
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import Block, Loss, Task

CPU = torch.device("cpu")


def task(blocks: int = 12) -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(blocks)))
    return Task(
        model,
        lambda model, batch: Loss(model(batch["inputs"]).square().mean()),
        tuple(Block(name, module) for name, module in model.named_children()),
    )


def step_of(one: Task) -> TrainingStep:
    config = OptimConfig(lr=0.1)
    optimizer = Optimizer(make_groups(one, config, {}), config, total_steps=10)
    return TrainingStep(one, optimizer, None, GradientsConfig(), make_precision("fp32", CPU))


def forwards_of(one: Task, mode: str = "off") -> BlockForwards:
    return BlockForwards(one, mode, make_precision("fp32", CPU))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    return cast(io.StringIO, console.file).getvalue()
