"""What a step costs, with bytes counted by hand: blocks say what they take, and when."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counted_blocks import (
    ACTIVATION,
    LINEAR,
    RECOMPUTING,
    SIZE,
    WIDTH,
    HandMeter,
    Layer,
    Setup,
    build,
    make_batch,
    step_over,
)
from torch import Tensor, nn

from fastft.blocks import KEEP, RECOMPUTE
from fastft.memory import plan
from fastft.memory.measure import (
    Rest,
    assemble_costs,
    capture_calls,
    distinct_blocks,
    measure_rest,
    rehearse,
    update_seconds,
)
from fastft.memory.menu import Menu
from fastft.memory.solve import Choice, peak_bytes
from fastft.memory.trial import Call, Trial
from fastft.step import TrainingStep
from fastft.task import Batch, Loss


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
        behind={"1": [0], "2": [0]},
    )


@pytest.mark.parametrize(("steady", "repeats"), [(True, [1]), (False, [3])])
def test_one_rehearsal_suffices_where_all_take_the_same(steady: bool, repeats: list[int]) -> None:
    one = build()
    one.meter.steady = steady
    assert measure_rest(one.step, [make_batch()], one.meter).seconds == 0.25
    assert one.meter.repeats == repeats


def test_a_frozen_stem_keeps_nothing_and_has_no_backward() -> None:
    one = build("0")
    rest = measure_rest(one.step, [make_batch()], one.meter)
    assert rest == Rest(
        fixed=1000,
        tail=920,
        tail_gradients=LINEAR,
        other_gradients=0,
        peak=1940,
        seconds=0.25,
        behind={"1": [0], "2": [0]},
    )


@pytest.mark.parametrize("batches", [1, 2])
def test_what_is_kept_between_blocks_is_behind_the_first(batches: int) -> None:
    one = build()
    between = Layer(one.meter, kept=60, forward=70, backward=80, gradients=0)
    stem, first, second, head = one.model.children()
    step = step_over(nn.Sequential(stem, first, between, second, head), "1", "3")
    rest = measure_rest(step, [make_batch(i) for i in range(batches)], one.meter)
    assert rest.behind == {"1": [60], "3": [0]}
    measured = {name: {"": Choice("", 10, 300, 500, 0.1)} for name in "13"}
    first, second = assemble_costs(step, rest, measured, batches).blocks
    assert (first.choices[0].kept_bytes, second.choices[0].kept_bytes) == (70, 10)
    # Gone when the first block's backward begins.
    assert (first.choices[0].backward_bytes, second.choices[0].backward_bytes) == (440, 500)


def test_over_a_roll_out_the_tail_comes_after_the_last_call() -> None:
    one = build()

    def twice(model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(model(batch["inputs"])).square().mean())

    one.step.task = dataclasses.replace(one.step.task, loss=twice)
    rest = measure_rest(one.step, [make_batch()], one.meter)
    # As with one call, whose head keeps 20; all that is on top of the 140 of the first call.
    assert (rest.before, rest.tail) == (100, 920)
    assert rest.peak == 1000 + 140 + 140 + 900
    # Head and stem, between the two calls.
    assert rest.behind == {"1": [0, 0], "2": [120, 0]}


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
    assert skips == [0.0]
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
    found = Menu(one.step.task, one.forwards, calls, names, one.meter).measure()
    assert {name: list(ways) for name, ways in found.items()} == {"1": names, "2": names}
    # These blocks say that they keep as much whatever the way.
    assert found["1"][KEEP.name] == Choice(KEEP.name, 10, 300, 500, 0.25)
    # The backward runs the forward again, and holds what that kept.
    assert found["1"][RECOMPUTE.name] == Choice(RECOMPUTE.name, 10, 300, 510, 0.25)
    assert all(p.grad is None for p in one.model.parameters())


def test_equal_blocks_are_measured_once() -> None:
    one = build()
    calls = capture_calls(one.step, make_batch())
    found = Menu(one.step.task, one.forwards, calls, [KEEP.name], one.meter).measure()
    once = len(one.meter.repeats)
    assert found["1"] == found["2"]
    one.model.get_submodule("2").requires_grad_(False)
    calls = capture_calls(one.step, make_batch())
    Menu(one.step.task, one.forwards, calls, [KEEP.name], one.meter).measure()
    assert len(one.meter.repeats) == 3 * once


@pytest.mark.parametrize(("small", "has_all"), [(50, True), (5, False)])
def test_blocks_that_keep_little_have_two_ways(
    small: int, has_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build()
    one.model.get_submodule("2").requires_grad_(False)
    names = list(one.forwards.ways)

    def costs(trial: Trial, meter: object) -> Choice:
        size = 1000 if trial._parameters[0].requires_grad else small
        return Choice(trial.way, 0 if trial.way == names[-1] else size, 0, 0, 0.0)

    monkeypatch.setattr("fastft.memory.menu.measure_block", costs)
    calls = capture_calls(one.step, make_batch())
    found = Menu(one.step.task, one.forwards, calls, names, one.meter).measure()
    assert list(found["1"]) == names
    assert list(found["2"]) == (names if has_all else [names[0], names[-1]])


def test_blocks_without_anything_to_differentiate() -> None:
    one = build("0", "1")
    calls = capture_calls(one.step, make_batch())
    found = Menu(one.step.task, one.forwards, calls, list(one.forwards.ways), one.meter).measure()
    assert {choice.kept_bytes for choice in found["1"].values()} == {0}
    assert {choice.kept_bytes for choice in found["2"].values()} == {10}


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
