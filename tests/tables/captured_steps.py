"""Steps of a small model, and in place of a CUDA graph a call that is made again."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from small_model import Block, squared_error
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastft.config import GradientsConfig, LossConfig, OptimConfig, Penalty
from fastft.fused import Kernels
from fastft.graphs.record import Outputs, Run
from fastft.losses import make_penalty
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import LossFunction, Task

CPU = torch.device("cpu")


def record(run: Run, device: torch.device) -> tuple[Callable[[], object], Outputs]:
    """Makes the call again and copies its outputs into the first ones."""
    kept = run()

    def tensors(outputs: Outputs) -> list[Tensor]:
        losses, gradients = outputs
        leaves = tree_leaves([[[x.total, dict(x.parts)] for x in losses], gradients])
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def replay() -> None:
        for old, new in zip(tensors(kept), tensors(run()), strict=True):
            old.copy_(new)

    return replay, kept


def frozen(run: Run, device: torch.device) -> tuple[Callable[[], object], Outputs]:
    """Outputs that never change, as those of a graph that does not see its inputs."""
    return lambda: None, run()


KINDS = {
    "adamw": ({}, {}, "fp32", Kernels()),
    "sgd": ({"name": "sgd"}, {"clip_norm": 0.1}, "fp32", Kernels()),
    "rmsprop in fp16": ({"name": "rmsprop"}, {}, "fp16", Kernels()),
    "fastft's adam": ({}, {"clip_norm": 0.1}, "fp32", Kernels(adam=True, norm=True)),
}


def make_step(
    kind: Any = KINDS["sgd"],
    loss: LossFunction = squared_error,
    model: nn.Module | None = None,
    *,
    punished: bool = False,
) -> TrainingStep:
    """A step over a model with running statistics, one of whose layers is not used."""
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Block(), nn.Linear(4, 1))
        model.add_module("spare", nn.Identity())
        model.get_submodule("spare").register_parameter("weight", nn.Parameter(torch.ones(2)))
    optim, gradients, name, kernels = kind
    task, config = Task(model, loss), OptimConfig(lr=0.01, **optim)
    optimizer = Optimizer(make_groups(task, config, {}), config, 100, kernels)
    punish = LossConfig(penalties=(Penalty(kind="l2", match=("0.weight",), weight=0.5),))
    penalty = make_penalty(punish, model, list(optimizer.parameters)) if punished else None
    precision = make_precision(name, CPU)
    return TrainingStep(task, optimizer, penalty, GradientsConfig(**gradients), precision, kernels)


def everything(step: TrainingStep) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": step.task.model.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "guard": step.guard.state_dict(),
            "untouched": step.untouched_names(),
            "random": torch.get_rng_state(),
        }
    )


def assert_same_bits(ours: Any, theirs: Any) -> None:
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
