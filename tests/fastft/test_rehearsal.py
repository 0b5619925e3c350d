"""A rehearsal is a whole step that changes nothing; `Optimizer.forget` begins anew."""

import copy
import random

import numpy as np
import pytest
import torch
from small_model import Block, make_batch, squared_error
from torch import nn
from torch.utils._pytree import tree_flatten

from fastft.config import GradientsConfig, OptimConfig, ZClipConfig
from fastft.fused import Kernels
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.runtime import seed_everything
from fastft.step import TrainingStep
from fastft.task import Batch, Loss, Task

CPU = torch.device("cpu")
FUSED = Kernels(adam=True, norm=True)
ZCLIP = ZClipConfig(warmup_steps=2)
# Every optimizer and every kind of guard: [optim], [gradients], precision, kernels.
REHEARSED = {
    "adamw": ({}, {}, "fp32", Kernels()),
    "adamw in fp16": ({}, {"clip_norm": 0.1}, "fp16", Kernels()),
    "sgd": ({"name": "sgd"}, {}, "fp32", Kernels()),
    "rmsprop": ({"name": "rmsprop", "momentum": 0.9}, {}, "fp16", Kernels()),
    "8-bit": ({"moments": "8bit"}, {"zclip": ZCLIP}, "fp32", FUSED),
    "8-bit in fp16": ({"moments": "8bit"}, {"zclip": ZCLIP}, "fp16", FUSED),
}
each_kind = pytest.mark.parametrize("kind", REHEARSED.values(), ids=list(REHEARSED))


def make_step(task: Task, kind) -> TrainingStep:
    optim, gradients, name, kernels = kind
    config = OptimConfig(lr=0.01, **optim)
    optimizer = Optimizer(make_groups(task, config, {}), config, 100, kernels)
    precision = make_precision(name, CPU)
    return TrainingStep(task, optimizer, None, GradientsConfig(**gradients), precision, kernels)


def make_rehearsed(kind) -> TrainingStep:
    """A step over a model with running statistics and dropout, one of whose layers is frozen."""
    torch.manual_seed(0)
    norm, frozen = nn.BatchNorm1d(4), nn.Linear(4, 4).requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 4), norm, frozen, Block(), nn.Dropout(0.3), nn.Linear(4, 1))
    step = make_step(Task(model=model, loss=squared_error), kind)
    if step.precision.name == "fp16":
        # With the first scale the first steps overflow, and update nothing.
        step.guard.scale.fill_(1024.0)
    return step


def rehearse(step: TrainingStep) -> None:
    """Good micro-batches, then one that overflows."""
    bad = make_batch(seed=9)
    bad["inputs"][0] = torch.inf
    with step.rehearsal():
        for batches in ([make_batch(seed=7), make_batch(seed=8)], [bad]):
            step(0, batches)


def everything(step: TrainingStep) -> dict:
    """What training goes on from, but for the optimizer's state."""
    model = step.task.model
    return {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "guard": {name: value.clone() for name, value in step.guard.state_dict().items()},
        "untouched": step.untouched_names(),
        "random": torch.get_rng_state(),
    }


def trained(step: TrainingStep, count: int) -> dict:
    """Losses and norms of steps, and where they lead."""
    results = [step(index, [make_batch(seed=index)]) for index in range(count)]
    shown = [(result.loss.clone(), result.verdict.norm.clone()) for result in results]
    bad = step.guard.take_bad_names()
    optimizer = step.optimizer.state_dict()
    return {"shown": shown, "bad": bad, "optimizer": optimizer, **everything(step)}


def assert_same_bits(ours, theirs) -> None:
    ours, shape = tree_flatten(ours)
    theirs, other = tree_flatten(theirs)
    assert shape == other
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


@each_kind
def test_training_after_a_rehearsal_is_training_without_it(kind) -> None:
    expected = trained(make_rehearsed(kind), 6)
    assert expected["guard"]["skipped"] == 0
    step = make_rehearsed(kind)
    rehearse(step)
    step.optimizer.forget()
    assert_same_bits(trained(step, 6), expected)


@each_kind
@pytest.mark.parametrize("earlier_steps", [0, 4])
def test_a_rehearsal_changes_nothing(kind, earlier_steps: int) -> None:
    step = make_rehearsed(kind)
    trained(step, earlier_steps)
    before, state = everything(step), copy.deepcopy(step.optimizer.state_dict())
    assert set(before["gradients"].values()) == {None}
    rehearse(step)
    assert_same_bits(everything(step), before)
    assert step.guard.take_bad_names() == []
    if earlier_steps:
        assert_same_bits(step.optimizer.state_dict(), state)


@each_kind
def test_a_rehearsal_that_fails_changes_nothing(kind) -> None:
    step = make_rehearsed(kind)
    before = everything(step)
    fails = pytest.raises(RuntimeError, match="shapes cannot be multiplied")
    with fails, step.rehearsal():
        step(0, [make_batch()])
        step.task.model(torch.full((8, 4), torch.inf)).sum().backward()
        step(1, [make_batch(), Batch({"inputs": torch.ones(8, 3)}, 8)])
    assert_same_bits(everything(step), before)
    # The next step is none.
    step.optimizer.forget()
    step(0, [make_batch()])
    assert not torch.equal(step.task.model.get_parameter("0.weight"), before["model"]["0.weight"])


@each_kind
def test_forgetting_begins_anew(kind) -> None:
    step = make_rehearsed(kind)
    trained(step, 3)
    step.optimizer.forget()
    fresh = make_rehearsed(kind)
    assert_same_bits(step.optimizer.state_dict(), fresh.optimizer.state_dict())
    fresh.task.model.load_state_dict(step.task.model.state_dict())
    fresh.guard.load_state_dict(step.guard.state_dict())
    for one in (step, fresh):
        torch.manual_seed(1)
        trained(one, 3)
    assert_same_bits(everything(step), everything(fresh))
    assert_same_bits(step.optimizer.state_dict(), fresh.optimizer.state_dict())


class Odd(nn.Module):
    """Buffers that are replaced, made, grown with a number beside them, and that share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mask", torch.ones(1, 4).expand(8, 4))
        self.register_buffer("late", None)
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.rows, self.calls = 2, 0

    def forward(self, x):
        self.count = self.count + 1
        self.late = x.detach().mean()
        if len(x) > self.rows:
            self.cache, self.rows = torch.ones(len(x)), len(x)
        self.calls += 1
        return self.linear(x * self.mask * self.cache[: len(x), None])


def test_a_rehearsal_leaves_odd_buffers() -> None:
    model = Odd()
    step = make_step(Task(model=model, loss=squared_error), REHEARSED["sgd"])
    count, mask = model.get_buffer("count"), model.get_buffer("mask")
    with step.rehearsal():
        step(0, [make_batch()])
        assert (model.calls, model.rows, len(model.cache)) == (1, 8, 8)
    assert (model.calls, model.rows, len(model.cache), model.late) == (0, 2, 2, None)
    assert model.count is count
    assert count == 0
    assert model.get_buffer("mask") is mask
    assert mask.stride() == (0, 1)
    assert torch.equal(mask, torch.ones(8, 4))
    step(0, [make_batch()])
    assert (model.calls, model.rows, model.count) == (1, 8, 1)


def test_a_rehearsal_moves_no_random_generator() -> None:
    def loss(model: nn.Module, batch: Batch) -> Loss:
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return Loss(model(batch["inputs"]).square().mean() * noise)

    step = make_step(Task(model=nn.Linear(4, 1), loss=loss), REHEARSED["sgd"])

    def draws() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    seed_everything(3)
    expected = draws()
    seed_everything(3)
    with step.rehearsal():
        step(0, [make_batch()])
    assert draws() == expected
    seed_everything(3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), step.rehearsal():
        step(0, [Batch({"inputs": torch.ones(8, 3)}, 8)])
    assert draws() == expected


def test_a_rehearsal_may_be_inside_another() -> None:
    """As where a step is captured that is rehearsed."""
    step = make_rehearsed(REHEARSED["adamw"])
    before = copy.deepcopy(step.task.model.state_dict())
    with step.rehearsal():
        with step.rehearsal():
            step(0, [make_batch()])
        step(1, [make_batch()])
    for name, value in step.task.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_rehearsal_in_a_run_keeps_what_is_to_be_said() -> None:
    step = make_rehearsed(REHEARSED["adamw"])
    bad = make_batch(seed=9)
    bad["inputs"][0] = torch.inf
    step(0, [bad])
    rehearse(step)
    names = step.guard.take_bad_names()
    assert "0.weight" in names
    rehearse(step)
    assert step.guard.take_bad_names() == []
