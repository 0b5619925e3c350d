"""Planning where a loss contains derivatives, or a block works in place or is called often."""

import dataclasses

import pytest
import torch
from counted_blocks import build, make_batch
from torch import Tensor, nn

from fastft.blocks import KEEP, RECOMPUTE, BlockForwards
from fastft.config import GradientsConfig, OptimConfig
from fastft.errors import PlanError
from fastft.memory import plan
from fastft.memory.measure import capture_calls, differentiates_twice, measure_rest
from fastft.memory.menu import Menu
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import Batch, Block, Loss, LossFunction, Task

CPU = torch.device("cpu")


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.linear(x)


def value(model: nn.Module, batch: Batch) -> Loss:
    return Loss(model(batch["inputs"]).square().mean())


def force(model: nn.Module, batch: Batch) -> Loss:
    inputs = batch["inputs"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return Loss(gradient.square().mean())


def make(model: nn.Sequential, loss: LossFunction) -> tuple[TrainingStep, BlockForwards]:
    blocks = tuple(Block(str(i), module) for i, module in enumerate(model) if i)
    task, config = Task(model, loss, blocks), OptimConfig(lr=0.1)
    optimizer = Optimizer(make_groups(task, config, {}), config, total_steps=4)
    precision = make_precision("fp32", CPU)
    forwards = BlockForwards(task, "off", precision)
    return TrainingStep(task, optimizer, None, GradientsConfig(), precision), forwards


def tanhs() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 4), *(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
    )


def batch() -> Batch:
    return Batch({"inputs": torch.linspace(-1, 1, 8).view(2, 4)}, 2)


def test_a_loss_on_derivatives_is_found_out() -> None:
    for loss, expected in ((value, False), (force, True)):
        step, forwards = make(tanhs(), loss)
        forwards.use_everywhere(RECOMPUTE)
        assert differentiates_twice(step, [batch()]) is expected


def test_such_a_loss_has_only_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def noted(task: object, forwards: object, calls: object, wanted: list[str], *_: object) -> None:
        names.extend(wanted)
        raise StopIteration

    monkeypatch.setattr(plan, "DeviceMeter", lambda device: FlatMeter())
    monkeypatch.setattr(plan, "Menu", lambda *a, **k: noted(*a))
    step, forwards = make(tanhs(), force)
    with pytest.raises(StopIteration):
        plan.measure_costs(step, forwards, [batch()])
    assert names == [KEEP.name, RECOMPUTE.name]


def test_blocks_that_change_their_input_cannot_be_planned() -> None:
    step, forwards = make(nn.Sequential(nn.Linear(4, 4), nn.Identity(), InPlace()), value)
    with pytest.raises(PlanError, match=r"^memory.plan: blocks must be able to run a second time"):
        plan.measure_costs(step, forwards, [batch()])


class Twice(nn.Module):
    """Calls its second module three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.again(x)
        return x


class FlatMeter:
    """One second for every call; ten bytes after every reading."""

    steady = False

    def __init__(self) -> None:
        self.now = 0

    def allocated(self) -> int:
        self.now += 10
        return self.now

    def peak(self) -> int:
        return self.now

    def reset_peak(self) -> None:
        pass

    def seconds(self, call: object, repeats: int, *, host_ahead: bool = False) -> float:
        return 1.0


def test_a_block_costs_as_often_as_it_is_called() -> None:
    model = Twice()
    blocks = (Block("first", model.first), Block("again", model.again))
    task, config = Task(model, value, blocks), OptimConfig(lr=0.1)
    optimizer = Optimizer(make_groups(task, config, {}), config, total_steps=4)
    precision = make_precision("fp32", CPU)
    step = TrainingStep(task, optimizer, None, GradientsConfig(), precision)
    forwards = BlockForwards(task, "off", precision)
    calls = capture_calls(step, batch())
    assert (calls["first"].times, calls["again"].times) == (1, 3)
    found = Menu(step.task, forwards, calls, [KEEP.name], FlatMeter()).measure()
    once, often = found["first"][KEEP.name], found["again"][KEEP.name]
    assert (once.kept_bytes, once.seconds) == (10, 1.0)
    assert (often.kept_bytes, often.seconds) == (30, 3.0)
    assert often.forward_bytes == 20 + once.forward_bytes


def test_what_is_called_without_gradients_has_nothing_behind() -> None:
    one = build()

    def pushed(model: nn.Module, batch: Batch) -> Loss:
        with torch.no_grad():
            first = model(batch["inputs"])
        return Loss(model(first).square().mean())

    one.step.task = dataclasses.replace(one.step.task, loss=pushed)
    rest = measure_rest(one.step, [make_batch()], one.meter)
    # Not the stem of the second pass, which stays until the backward of all blocks has run.
    assert rest.behind == {"1": [0], "2": [0]}
