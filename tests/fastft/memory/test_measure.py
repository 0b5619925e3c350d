"""What a step costs, with bytes counted by hand: blocks say what they take, and when."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft.blocks import EAGER, KEEP, RECOMPUTE, BlockForwards
from fastft.config import GradientsConfig, OptimConfig
from fastft.memory import plan
from fastft.memory.measure import (
    Rest,
    assemble_costs,
    capture_calls,
    distinct_blocks,
    measure_blocks,
    measure_rest,
    rehearse,
    update_seconds,
)
from fastft.memory.solve import BlockCosts, Choice, StepCosts, peak_bytes, step_seconds
from fastft.memory.trial import Call
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
        self.now = self.top = held
        self.repeats: list[int] = []

    def allocated(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.top

    def reset_peak(self) -> None:
        self.top = self.now

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
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


def test_what_is_there_besides_the_blocks() -> None:
    one = build()
    # Before the step; none of its peak.
    one.meter.touch(10**7)
    rest = measure_rest(one.step, [make_batch()], one.meter)
    # Forward: 1000, stem 1100, blocks 1120, head 1140. Backward: head 1125, blocks 1111, stem 1018.
    assert rest == Rest(
        fixed=1000,
        before=100,
        # From 1111, without the gradient that arrives, which nobody told the meter of.
        before_backward=40 + ACTIVATION,
        # From 1120 to 900 above 1140.
        tail=920,
        tail_gradients=LINEAR,
        other_gradients=LINEAR,
        peak=2040,
        seconds=0.25,
    )


def test_a_frozen_stem_keeps_nothing_and_has_no_backward() -> None:
    one = build("0")
    rest = measure_rest(one.step, [make_batch()], one.meter)
    assert rest == Rest(
        fixed=1000, tail=920, tail_gradients=LINEAR, other_gradients=0, peak=1940, seconds=0.25
    )


def test_over_a_roll_out_the_tail_comes_after_the_last_call() -> None:
    one = build()

    def twice(model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(model(batch["inputs"])).square().mean())

    one.step.task = dataclasses.replace(one.step.task, loss=twice)
    rest = measure_rest(one.step, [make_batch()], one.meter)
    # As with one call, whose head keeps 20; all that is on top of the 140 of the first call.
    assert (rest.before, rest.tail) == (100, 920)
    assert rest.peak == 1000 + 140 + 140 + 900


def test_peaks_of_every_part_are_seen() -> None:
    """Each part in turn takes the most of all."""
    for index, where in ((0, "forward"), (1, "forward"), (2, "backward"), (0, "backward")):
        one = build()
        setattr(one.model.get_submodule(f"{index}"), f"{where}_bytes", 10**6)
        rest = measure_rest(*measuring(one))
        assert 0 <= rest.peak - 10**6 - 1000 < 200
        assert rest.tail == 920
    one = build()
    update = one.step.optimizer.update

    def costly(step: int, divisor: Tensor, skip: Tensor, *, rate: float = 1.0) -> None:
        one.meter.touch(10**6)
        update(step, divisor, skip, rate=rate)

    one.step.optimizer.update = costly
    rest = measure_rest(one.step, [make_batch()], one.meter)
    assert rest.peak == 10**6 + 1018
    # Nothing but the model of the peak tells the solver so.
    measured = {name: {"": Choice("", 10, 300, 500, 0.1)} for name in "12"}
    assert peak_bytes(assemble_costs(one.step, rest, measured, 1), (0, 0)) == rest.peak


def test_the_update_is_timed_at_full_cost_and_moves_no_parameter() -> None:
    one = build()
    update, skips = one.step.optimizer.update, []

    def watched(step: int, divisor: Tensor, skip: Tensor, *, rate: float = 1.0) -> None:
        skips.append(skip.item())
        assert all(p.grad is not None for p in one.step.optimizer.parameters.values())
        update(step, divisor, skip, rate=rate)

    one.step.optimizer.update = watched
    before = everything(one.model)
    assert update_seconds(one.step, one.meter) == 0.25
    assert len(skips) > 1
    assert set(skips) == {0.0}
    assert_unchanged(one.model, before)


def test_a_second_micro_batch_is_not_the_backward_of_the_stem() -> None:
    one = build()
    rest = measure_rest(one.step, [make_batch(0), make_batch(1)], one.meter)
    # The second's head, with the 18 bytes of gradients of the first.
    assert rest.peak == 2040 + 18
    expected = measure_rest(*measuring(build()))
    assert dataclasses.replace(rest, peak=expected.peak) == expected


def measuring(one: Setup) -> tuple[TrainingStep, list[Batch], HandMeter]:
    return one.step, [make_batch()], one.meter


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        "random": torch.get_rng_state(),
        "gradients": [p.grad for p in model.parameters()],
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ],
        "training": [module.training for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = everything(model)
    assert now.keys() == before.keys()
    for name, value in before.items():
        equal = torch.equal(value, now[name]) if isinstance(value, Tensor) else value == now[name]
        assert equal, name


@pytest.mark.parametrize(
    "measure",
    [
        lambda one: rehearse(one.step, [make_batch(0), make_batch(1)]),
        lambda one: capture_calls(one.step, make_batch()),
        lambda one: measure_rest(*measuring(one)),
    ],
    ids=["rehearse", "capture_calls", "measure_rest"],
)
def test_measuring_changes_nothing(measure: Callable[[Setup], object]) -> None:
    one = build()
    before = everything(one.model)
    measure(one)
    assert_unchanged(one.model, before)


def test_hooks_go_where_the_step_fails() -> None:
    one = build()
    before = everything(one.model)
    for measure in (
        lambda: capture_calls(one.step, Batch({"inputs": torch.ones(2, 3)}, 2)),
        lambda: measure_rest(one.step, [Batch({"inputs": torch.ones(2, 3)}, 2)], one.meter),
    ):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            measure()
        assert_unchanged(one.model, before)


class Takes(nn.Module):
    """Blocks that are called with more than a tensor."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        x = self.linear(x) * scale
        return x if mask is None else x * mask


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Takes() for _ in range(8))
        self.blocks[2].requires_grad_(False)
        self.narrow = nn.ModuleList([Takes(2)])
        self.idle = Takes()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mask = torch.ones(SIZE, 1)
        x = self.blocks[0](x)
        x = self.blocks[1](x)
        x = self.blocks[2](x)
        x = self.blocks[3](x, mask, scale=2.0)
        x = self.blocks[4](x, mask.bool(), scale=2.0)
        x = self.blocks[5](x, mask, scale=2.0)
        x = self.blocks[5](x, None)
        x = self.blocks[6](x[: SIZE // 2])
        x = self.blocks[7](x.detach())
        return self.narrow[0](x[:, :2])


def test_calls_are_kept_once_for_each_distinct_block() -> None:
    torch.manual_seed(0)
    model = Calls()
    names = [*(f"blocks.{i}" for i in range(8)), "narrow.0", "idle"]
    step = step_over(model, *names)
    calls = capture_calls(step, make_batch())
    assert set(calls) == set(names) - {"idle"}
    groups = [
        [block.name for block in members] for members in distinct_blocks(step.task, calls).values()
    ]
    assert groups == [
        ["blocks.0", "blocks.1"],
        ["blocks.2"],
        ["blocks.3", "blocks.5"],
        ["blocks.4"],
        ["blocks.6"],
        ["blocks.7"],
        ["narrow.0"],
    ]
    for first, *others in groups:
        assert all(calls[other].arguments is calls[first].arguments for other in others)
    ((x, mask), keywords) = calls["blocks.5"].arguments, calls["blocks.5"].keywords
    assert keywords == {"scale": 2.0}
    assert (x.shape, x.requires_grad, mask.requires_grad) == ((SIZE, WIDTH), True, False)
    assert not calls["blocks.7"].arguments[0].requires_grad
    assert {y.grad_fn for y in (x, mask)} == {None}


def test_calls_that_keep_something_count() -> None:
    """Over a roll-out, the first call of a first block has no differentiable inputs."""
    one = build()
    first = one.step.task.blocks[0].module

    def roll_out(model: nn.Module, batch: Batch) -> Loss:
        with torch.no_grad():
            start = model(batch["inputs"])
        x = first(first(start))
        return Loss(model(x).square().mean())

    one.step.task = dataclasses.replace(one.step.task, loss=roll_out)
    calls = capture_calls(one.step, make_batch())
    assert {name: call.times for name, call in calls.items()} == {"1": 3, "2": 1}
    assert calls["1"].arguments[0].requires_grad


class Optional(nn.Module):
    """Blocks with equal parameters that keep other activations."""

    def __init__(self, inside: nn.Module, *, mask: bool) -> None:
        super().__init__()
        self.linear, self.inside = nn.Linear(WIDTH, WIDTH), inside
        self.mask: Tensor | None
        self.register_buffer("mask", torch.ones(SIZE, WIDTH) if mask else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(self.linear(x))
        return x if self.mask is None else x * self.mask


def test_blocks_of_other_insides_are_distinct() -> None:
    blocks = [Optional(nn.Identity(), mask=False) for _ in range(2)]
    blocks += [Optional(nn.GELU(), mask=False), Optional(nn.Identity(), mask=True)]
    step = step_over(nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks), "1", "2", "3", "4")
    found = distinct_blocks(step.task, capture_calls(step, make_batch()))
    assert [[b.name for b in members] for members in found.values()] == [["1", "2"], ["3"], ["4"]]


def test_a_call_gives_fresh_inputs() -> None:
    """Of a graph of their own, and no leaves: a block may change them in place."""
    x = torch.ones(2, requires_grad=True)
    call = Call((x.detach().requires_grad_(), 3), {"deep": [torch.ones(2), None]})
    (first, three), keywords = call.fresh()
    (second, _), _ = call.fresh()
    assert three == 3
    assert keywords["deep"][1] is None
    assert not keywords["deep"][0].requires_grad
    first.add_(1).sum().backward()
    assert x.grad is None
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(second, torch.ones(2))


def test_a_block_alone() -> None:
    one = build()
    one.model.get_submodule("2").requires_grad_(False)
    calls = capture_calls(one.step, make_batch())
    names = [KEEP.name, RECOMPUTE.name]
    found = measure_blocks(one.step, one.forwards, calls, names, one.meter)
    assert {name: list(ways) for name, ways in found.items()} == {"1": names, "2": names}
    # These blocks say that they keep as much whatever the way.
    assert found["1"][KEEP.name] == Choice(KEEP.name, 10, 300, 500, 0.25)
    # The backward runs the forward again, and holds what that kept.
    assert found["1"][RECOMPUTE.name] == Choice(RECOMPUTE.name, 10, 300, 510, 0.25)
    assert all(p.grad is None for p in one.model.parameters())


def test_equal_blocks_are_measured_once() -> None:
    one = build()
    calls = capture_calls(one.step, make_batch())
    found = measure_blocks(one.step, one.forwards, calls, [KEEP.name], one.meter)
    once = len(one.meter.repeats)
    assert found["1"] == found["2"]
    one.model.get_submodule("2").requires_grad_(False)
    calls = capture_calls(one.step, make_batch())
    measure_blocks(one.step, one.forwards, calls, [KEEP.name], one.meter)
    assert len(one.meter.repeats) == 3 * once


def test_blocks_without_anything_to_differentiate() -> None:
    one = build("0", "1")
    calls = capture_calls(one.step, make_batch())
    found = measure_blocks(one.step, one.forwards, calls, list(one.forwards.ways), one.meter)
    assert {choice.kept_bytes for choice in found["1"].values()} == {0}
    assert {choice.kept_bytes for choice in found["2"].values()} == {10}


MEASURED = {
    "1": {"keep": Choice("keep", 60, 70, 30, 0.5), "redo": Choice("redo", 10, 70, 95, 0.75)},
    "2": {"keep": Choice("keep", 40, 50, 35, 0.5), "redo": Choice("redo", 20, 50, 85, 0.625)},
}
REST = Rest(
    fixed=1000,
    before=100,
    before_backward=40,
    tail=900,
    tail_gradients=LINEAR,
    other_gradients=LINEAR,
    peak=2100,
    seconds=4.0,
)


def test_the_costs_of_a_step() -> None:
    costs = assemble_costs(build().step, REST, MEASURED, 1)
    # The model's peak: 1000 and 100, 30 kept by the blocks, 900 of the tail.
    missed = 2100 - 2030
    assert costs == StepCosts(
        blocks=tuple(
            BlockCosts(name, tuple(choices.values()), LINEAR) for name, choices in MEASURED.items()
        ),
        fixed_bytes=1000 + missed,
        before_bytes=100,
        before_backward_bytes=40,
        tail_bytes=900,
        tail_gradient_bytes=LINEAR,
        update_bytes=LINEAR,
        other_seconds=4.0 - 0.75 - 0.625,
    )


def test_with_several_micro_batches_all_gradients_are_there_from_the_start() -> None:
    costs = assemble_costs(build("0").step, REST, MEASURED, 2)
    assert [block.gradient_bytes for block in costs.blocks] == [0, 0]
    assert (costs.tail_gradient_bytes, costs.update_bytes) == (0, 0)
    # Those of two blocks and the head; the stem is frozen.
    assert costs.fixed_bytes == 1000 + 3 * LINEAR + (2100 - 2030 - 3 * LINEAR)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("peak", [2100, 2030, 1900])
@pytest.mark.parametrize("frozen", [(), ("0",), ("0", "1")])
def test_the_model_agrees_with_the_rehearsal(
    micro_batches: int, peak: int, frozen: tuple[str, ...]
) -> None:
    rest = dataclasses.replace(REST, peak=peak)
    costs = assemble_costs(build(*frozen).step, rest, MEASURED, micro_batches)
    assert peak_bytes(costs, (1, 1)) == peak
    assert step_seconds(costs, (1, 1)) == pytest.approx(4.0)
    saved = micro_batches * (0.25 + 0.125)
    assert step_seconds(costs, (0, 0)) == pytest.approx(4.0 - saved)


def test_blocks_that_are_not_called_have_no_costs() -> None:
    costs = assemble_costs(build().step, REST, {"2": MEASURED["2"]}, 1)
    assert [block.name for block in costs.blocks] == ["2"]


def test_nothing_is_negative() -> None:
    rest = dataclasses.replace(REST, peak=500, seconds=0.1)
    costs = assemble_costs(build().step, rest, MEASURED, 1)
    assert costs.fixed_bytes == 0
    assert costs.other_seconds == 0


def test_the_whole_menu_is_measured_and_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = build()
    monkeypatch.setattr(plan, "DeviceMeter", lambda device: one.meter)
    before = everything(one.model)
    costs = plan.measure_costs(one.step, one.forwards, [make_batch()])
    assert costs.update_seconds == 0.25
    assert_unchanged(one.model, before)
    assert set(one.forwards.chosen.values()) == {RECOMPUTE.name}
    assert [block.name for block in costs.blocks] == ["1", "2"]
    assert [choice.name for choice in costs.blocks[0].choices] == RECOMPUTING
    assert costs.tail_bytes == 920
