"""Planning with the host's memory: what ways that use it cost, and when they are left out."""

from collections.abc import Callable

import pytest
import torch
from no_bytes import NoBytes
from torch import Tensor, nn

from fastft import offload
from fastft.blocks import EAGER, KEEP, LEAST, OFFLOAD, RECOMPUTE, BlockForwards
from fastft.config import GradientsConfig, OptimConfig
from fastft.memory import menu, plan
from fastft.memory.measure import capture_calls
from fastft.memory.menu import Menu
from fastft.memory.solve import host_bytes, solve
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import Batch, Block, Loss, Task

CPU = torch.device("cpu")
ROWS, WIDTH, DEPTH = 16, 32, 6
# Of a float32 tensor [ROWS, WIDTH]: a power of two, as buffers are.
ACTIVATION = 4 * ROWS * WIDTH
RECOMPUTING = [way.name for way in EAGER if not way.offload]


class Wide(nn.Module):
    """Saves its input, and a hidden layer of four times its width twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.down(nn.functional.gelu(self.up(x)))


class Seconds(NoBytes):
    """Three seconds for every call, which is made once."""

    def seconds(
        self, call: Callable[[], object], repeats: int, *, host_ahead: bool = False
    ) -> float:
        call()
        return 3.0


def square(model: nn.Module, batch: Batch) -> Loss:
    return Loss(model(batch["inputs"]).square().mean())


def batch() -> Batch:
    return Batch({"inputs": torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)}, ROWS)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> tuple[TrainingStep, BlockForwards]:
    monkeypatch.setattr(offload, "_LEAST_BYTES", ACTIVATION)
    monkeypatch.setattr(plan, "DeviceMeter", lambda device: Seconds())
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Wide() for _ in range(DEPTH)))
    blocks = tuple(Block(str(i), model[i]) for i in range(1, DEPTH + 1))
    task, config = Task(model, square, blocks), OptimConfig(lr=0.1)
    optimizer = Optimizer(make_groups(task, config, {}), config, total_steps=4)
    precision = make_precision("fp32", CPU)
    forwards = BlockForwards(task, "off", precision)
    return TrainingStep(task, optimizer, None, GradientsConfig(), precision), forwards


def test_ways_that_offload_are_timed_on_a_chain(
    setup: tuple[TrainingStep, BlockForwards], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(menu, "_ROUNDS", 1)
    step, forwards = setup
    calls = capture_calls(step, batch())
    first = step.task.blocks[0].module
    assert isinstance(first, Wide)
    ran = {}
    for way in (KEEP, OFFLOAD):
        first.forwards = 0
        found = Menu(step.task, forwards, calls, [way.name], Seconds()).measure()
        ran[way] = first.forwards
        assert found["1"][way.name].seconds == (1.0 if way.offload else 3.0)
    # The one that compiles, the measured one with one before it, and the timed one.
    assert ran == {KEEP: 3, OFFLOAD: 3 + 2 + 3}
    assert forwards.host.held_bytes == 0


def test_bytes_on_the_host(setup: tuple[TrainingStep, BlockForwards]) -> None:
    step, forwards = setup
    said: list[str] = []
    costs = plan.measure_costs(step, forwards, [batch()], said.append)
    assert said == []
    assert set(forwards.chosen.values()) == {LEAST.name}
    for block in costs.blocks:
        choices = {choice.name: choice.host_bytes for choice in block.choices}
        assert list(choices) == [way.name for way in EAGER]
        assert choices.pop(OFFLOAD.name) == 9 * ACTIVATION
        assert choices.pop(LEAST.name) == ACTIVATION
        assert set(choices.values()) == {0}
    names = [choice.name for choice in costs.blocks[0].choices]
    picks = [names.index(way.name) for way in (OFFLOAD, LEAST, RECOMPUTE)] * 2
    assert host_bytes(costs, picks) == 20 * ACTIVATION
    assert solve(costs, 2**40) is not None


@pytest.mark.parametrize(
    ("room", "names", "notes"),
    [
        (
            9 * DEPTH * ACTIVATION - 1,
            [*RECOMPUTING, LEAST.name],
            [f"memory: '{OFFLOAD.name}' would take more than half of the host's free memory"],
        ),
        (
            DEPTH * ACTIVATION,
            [*RECOMPUTING, LEAST.name],
            [
                f"memory: 1 and its like cannot '{OFFLOAD.name}': the host has too little memory",
            ],
        ),
        (
            DEPTH * ACTIVATION - 1,
            RECOMPUTING,
            [
                "memory: the inputs of all blocks would take more than half of the host's free"
                " memory"
            ],
        ),
    ],
    ids=["too little for all that is saved", "too little to try", "too little for inputs"],
)
def test_a_host_that_has_too_little(
    room: int,
    names: list[str],
    notes: list[str],
    setup: tuple[TrainingStep, BlockForwards],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "available_bytes", lambda: 2 * room)
    step, forwards = setup
    said: list[str] = []
    costs = plan.measure_costs(step, forwards, [batch()], said.append)
    assert said == notes
    for block in costs.blocks:
        assert sorted(choice.name for choice in block.choices) == sorted(names)
        assert block.choices[-1].name == names[-1]
    assert set(forwards.chosen.values()) == {names[-1]}


def test_blocks_with_small_inputs_leave_the_host_alone(
    setup: tuple[TrainingStep, BlockForwards], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_LEAST_BYTES", ACTIVATION + 1)
    step, forwards = setup
    costs = plan.measure_costs(step, forwards, [batch()])
    assert [choice.name for choice in costs.blocks[0].choices] == RECOMPUTING
    assert set(forwards.chosen.values()) == {RECOMPUTE.name}
