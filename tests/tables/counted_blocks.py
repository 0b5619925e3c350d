"""Blocks that say what memory they take, and when; a meter that believes them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastft.blocks import EAGER, BlockForwards
from fastft.config import GradientsConfig, OptimConfig
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import Batch, Block, Loss, Task

CPU = torch.device("cpu")
# The menu of blocks whose inputs are too small to go to the host.
RECOMPUTING = [way.name for way in EAGER if not way.offload]
SIZE, WIDTH = 8, 4
# Of a float32 tensor [SIZE, WIDTH], and of the parameters of a linear layer.
ACTIVATION, LINEAR = 4 * SIZE * WIDTH, 4 * (WIDTH * WIDTH + WIDTH)


class HandMeter:
    """Counts what it is told, not what torch allocates; every call takes a quarter of a second."""

    def __init__(self, held: int = 0) -> None:
        self.steady = False
        self.now = self.top = held
        self.repeats: list[int] = []

    def allocated(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.top

    def reset_peak(self) -> None:
        self.top = self.now

    def seconds(
        self, call: Callable[[], object], repeats: int, *, host_ahead: bool = False
    ) -> float:
        self.repeats.append(repeats)
        call()
        return 0.25

    def touch(self, count: int) -> None:
        """Something that is freed at once."""
        self.top = max(self.top, self.now + count)

    def hold(self, count: int) -> None:
        self.now += count
        self.touch(0)


class Spend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Layer") -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        layer.meter.touch(layer.forward_bytes)
        layer.meter.hold(layer.kept if ctx.needs_input_grad[0] else 0)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Where nothing is kept, this runs the forward again.
        assert ctx.saved_tensors
        ctx.layer.meter.touch(ctx.layer.backward_bytes)
        ctx.layer.meter.hold(ctx.layer.gradients - ctx.layer.kept)
        return gradients[0], None


class Layer(nn.Module):
    """A linear layer with dropout and a running count, that takes memory as it is told."""

    def __init__(
        self, meter: HandMeter, kept: int, forward: int, backward: int, gradients: int
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.dropout = nn.Dropout(0.2)
        self.meter, self.kept, self.gradients = meter, kept, gradients
        self.forward_bytes, self.backward_bytes = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return Spend.apply(self.dropout(self.norm(self.linear(x))), self)


@dataclasses.dataclass
class Setup:
    meter: HandMeter
    step: TrainingStep
    forwards: BlockForwards

    @property
    def model(self) -> nn.Module:
        return self.step.task.model


def square(model: nn.Module, batch: Batch) -> Loss:
    return Loss(model(batch["inputs"]).square().mean())


def step_over(model: nn.Module, *names: str) -> TrainingStep:
    blocks = tuple(Block(name, model.get_submodule(name)) for name in names)
    task, config = Task(model, square, blocks), OptimConfig(lr=0.1)
    optimizer = Optimizer(make_groups(task, config, {}), config, total_steps=10)
    return TrainingStep(task, optimizer, None, GradientsConfig(), make_precision("fp32", CPU))


def build(*frozen: str) -> Setup:
    """Stem, two blocks, a head; with 1000 bytes before anything runs."""
    torch.manual_seed(0)
    meter = HandMeter(1000)
    model = nn.Sequential(
        Layer(meter, kept=100, forward=30, backward=40, gradients=7),
        Layer(meter, kept=10, forward=300, backward=500, gradients=3),
        Layer(meter, kept=10, forward=300, backward=500, gradients=3),
        Layer(meter, kept=20, forward=50, backward=900, gradients=5),
    )
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    step = step_over(model, "1", "2")
    return Setup(meter, step, BlockForwards(step.task, "off", step.precision))


def make_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch({"inputs": torch.randn(SIZE, WIDTH, generator=generator)}, SIZE)
