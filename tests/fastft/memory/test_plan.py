"""Plans: found on a simulated device, refused with advice, saved and replayed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from linear_blocks import CPU, forwards_of, quiet, step_of, task
from torch import nn

from fastft.blocks import EAGER, KEEP, OFFLOAD, RECOMPUTE, BlockForwards
from fastft.config import OptimConfig
from fastft.errors import PlanError
from fastft.memory import Plan, load_plan, make_plan, plan
from fastft.memory.rehearsal import Rehearsal
from fastft.memory.solve import (
    BlockCosts,
    Choice,
    Solution,
    StepCosts,
    peak_bytes,
    smallest_peak,
    solve,
    step_seconds,
)
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import Batch, Block, Loss, Task

BLOCKS, MB = 12, 10**6

WAYS = [way.name for way in EAGER if not way.offload]
# Kept, forward and backward MB, and seconds, as of a transformer's block, from most kept to least.
MENU = ((1000, 1300, 1600, 1.0), (700, 1000, 1900, 1.02), (550, 850, 2050, 1.08))
MENU += ((400, 700, 2200, 1.1), (100, 400, 2500, 1.33))
CHOICES = tuple(
    Choice(way, kept * MB, forward * MB, backward * MB, seconds)
    for way, (kept, forward, backward, seconds) in zip(WAYS, MENU, strict=True)
)
COSTS = StepCosts(
    blocks=tuple(BlockCosts(f"{i}", CHOICES, 50 * MB) for i in range(BLOCKS)),
    fixed_bytes=5000 * MB,
    before_bytes=100 * MB,
    before_backward_bytes=100 * MB,
    tail_bytes=1000 * MB,
    tail_gradient_bytes=10 * MB,
    update_bytes=1000 * MB,
    other_seconds=0.1,
)
MOST = peak_bytes(COSTS, [0] * BLOCKS)
LEAST = smallest_peak(COSTS)[0]


def picks(ways: Mapping[str, str]) -> list[int]:
    return [WAYS.index(ways[block.name]) for block in COSTS.blocks]


@dataclass
class Device:
    """A device whose true peak is the model's and what `missed` says; `hits` fails plans, but not
    where they may thrash.

    Attributes:
        tried: the picks and the true peak of each rehearsal, None where it hit the limit.
    """

    missed: Callable[[Sequence[int]], float] = lambda picks: 0
    hits: Callable[[Sequence[int]], bool] = lambda picks: False
    tried: list[tuple[list[int], int | None]] = field(default_factory=list)
    thrashed: bool = False

    def true_peak(self, chosen: Sequence[int]) -> int:
        return peak_bytes(COSTS, chosen) + round(self.missed(chosen))

    def make_plan(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
        """The plan that is found, which must be in use and within the limit."""
        one = task()
        forwards = forwards_of(one)

        def rehearse(
            step: TrainingStep, batches: Sequence[Batch], limit: int, *, may_thrash: bool = False
        ) -> Rehearsal | None:
            chosen = picks(forwards.chosen)
            peak = self.true_peak(chosen)
            self.thrashed |= may_thrash
            fits = peak <= limit and (may_thrash or not self.hits(chosen))
            self.tried.append((chosen, peak if fits else None))
            seconds = step_seconds(COSTS, chosen)
            return Rehearsal(peak, seconds, self.hits(chosen)) if fits else None

        monkeypatch.setattr(plan, "try_rehearsal", rehearse)
        monkeypatch.setattr(plan, "measure_costs", lambda *_, **__: COSTS)
        found = make_plan(step_of(one), forwards, [Batch({}, 8)], limit, quiet())
        chosen = picks(found.ways)
        assert forwards.chosen == found.ways
        assert (chosen, found.peak_bytes) in self.tried
        assert found.peak_bytes == self.true_peak(chosen) <= limit
        assert found.budget_bytes == limit
        assert not self.hits(chosen) or self.thrashed
        return found


# Where between the least and the most that the model predicts.
SHARES = (0.02, 0.1, 0.3, 0.6, 0.9)
shares = pytest.mark.parametrize("share", SHARES)


def limit_at(share: float) -> int:
    return round(LEAST + share * (MOST - LEAST))


def best_within(share: float, missed: float = 0.0, room: float = 1.0) -> Solution | None:
    """The fastest plan whose true peak is a share of the limit."""
    limit = limit_at(share)
    truth = replace(COSTS, fixed_bytes=COSTS.fixed_bytes + round(missed * limit))
    return solve(truth, round(room * limit))


@pytest.mark.parametrize(
    ("share", "missed"),
    [
        (share, missed)
        for share in SHARES
        for missed in (0.1, 0.03, 0.003, 0.0, -0.003, -0.03, -0.1, -0.25)
        if best_within(share, missed, 0.97)
    ],
)
def test_what_the_model_misses_is_made_up_for(
    share: float, missed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = limit_at(share)
    device = Device(missed=lambda _: missed * limit)
    found = device.make_plan(limit, monkeypatch)
    # With the slack, and what a try that fails gives up.
    best = best_within(share, missed, 0.97)
    assert best is not None
    assert step_seconds(COSTS, picks(found.ways)) <= best.seconds
    assert len(device.tried) <= 2 + plan._ATTEMPTS
    assert len({tuple(chosen) for chosen, _ in device.tried}) == len(device.tried)


@shares
def test_a_model_that_misses_some_ways_only(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = limit_at(share)
    device = Device(missed=lambda picks: 0.004 * limit * sum(0 < pick < 4 for pick in picks))
    found = device.make_plan(limit, monkeypatch)
    assert found.peak_bytes is not None
    assert len(device.tried) <= 2 + plan._ATTEMPTS


@pytest.mark.parametrize("share", [share for share in SHARES if best_within(share, room=0.94)])
def test_plans_that_hit_the_limit_below_their_peak(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the allocator loses memory to gaps: any plan within 4% of the limit."""
    limit = limit_at(share)
    device = Device(hits=lambda picks: peak_bytes(COSTS, picks) > 0.96 * limit)
    found = device.make_plan(limit, monkeypatch)
    best = best_within(share, room=0.94)
    assert best is not None
    assert step_seconds(COSTS, picks(found.ways)) <= best.seconds


def test_the_fastest_of_the_plans_that_fit_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that the first plan leaves makes the second, which hits the limit."""
    limit = limit_at(0.5)
    device = Device(missed=lambda picks: -0.1 * limit)
    first = solve(COSTS, round(limit * 0.99))
    assert first is not None
    device.hits = lambda picks: step_seconds(COSTS, picks) < first.seconds - 0.01
    found = device.make_plan(limit, monkeypatch)
    assert picks(found.ways) == list(first.picks)
    assert device.tried[1] == (list(first.picks), found.peak_bytes)
    assert {peak for _, peak in device.tried[2:]} == {None}


def test_where_nothing_else_fits_the_allocator_may_begin_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(hits=lambda picks: True)
    limit = limit_at(0.5)
    found = device.make_plan(limit, monkeypatch)
    # The fastest of those that do, not the one that keeps the least.
    fitting = [chosen for chosen, peak in device.tried if peak is not None]
    assert picks(found.ways) == min(fitting, key=lambda chosen: step_seconds(COSTS, chosen))
    assert found.predicted_bytes == found.peak_bytes != LEAST
    assert found.seconds == step_seconds(COSTS, picks(found.ways))
    assert device.thrashed
    with pytest.raises(PlanError):
        Device(hits=lambda picks: True).make_plan(LEAST - 1, monkeypatch)


def test_everything_is_kept_where_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure_costs", lambda *_, **__: pytest.fail("measured for nothing"))
    device = Device()
    with monkeypatch.context() as patched:
        found = device.make_plan(MOST, patched)
    assert set(found.ways.values()) == {KEEP.name}
    assert len(device.tried) == 1
    with pytest.raises(PlanError):
        Device().make_plan(LEAST // 2, monkeypatch)


def test_costs_that_are_given_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is keeping everything tried, where they say that it does not fit."""
    tried: list[set[str]] = []
    one = task()
    forwards = forwards_of(one)

    def rehearse(*_: object, **__: object) -> Rehearsal:
        tried.append(set(forwards.chosen.values()))
        chosen = picks(forwards.chosen)
        return Rehearsal(peak_bytes(COSTS, chosen), step_seconds(COSTS, chosen))

    monkeypatch.setattr(plan, "try_rehearsal", rehearse)
    monkeypatch.setattr(plan, "measure_costs", lambda *_, **__: pytest.fail("measured again"))
    for limit, keeps_all in ((limit_at(0.5), False), (2 * MOST, True)):
        tried.clear()
        found = make_plan(step_of(one), forwards, [Batch({}, 8)], limit, quiet(), COSTS)
        assert found.predicted_bytes == found.peak_bytes
        assert len(tried) == 1
        assert (tried[0] == {KEEP.name}) is keeps_all


def test_a_plan_that_promises_little_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the room that is left, 0.8 % of the limit, 0.02 of 12.56 seconds would be saved."""
    limit = limit_at(0.6)
    device = Device(missed=lambda _: -0.008 * limit)
    first = solve(COSTS, round(limit * 0.99))
    found = device.make_plan(limit, monkeypatch)
    assert first is not None
    assert picks(found.ways) == list(first.picks)
    assert len(device.tried) == 2


@pytest.mark.parametrize(
    ("limit", "missed"),
    [
        pytest.param(LEAST, 0.0, id="within the slack of the limit"),
        pytest.param(limit_at(0.6), 0.2, id="the model misses a fifth"),
    ],
)
def test_recomputing_all_is_the_last_resort(
    limit: int, missed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(missed=lambda _: missed * limit)
    assert device.true_peak([4] * BLOCKS) <= limit + MB
    limit = max(limit, device.true_peak([4] * BLOCKS))
    device.make_plan(limit, monkeypatch)


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    limit = round(0.8 * LEAST)
    with pytest.raises(PlanError) as raised:
        device.make_plan(limit, monkeypatch)
    # 12 layers of 6 float32 parameters: weights and gradients are 576 bytes.
    assert raised.value.problems == (
        "memory.budget: no plan fits 6.56 GiB, even with every block recomputed; weights and"
        " gradients take 0.00 GiB, the optimizer's state 0.00 GiB; the least peak is 8.20"
        " GiB",
        "data.batch_size: about 4 of 8 would fit; set it and raise step.accumulate to keep the"
        " batch",
        "optim.moments: 'bf16' saves 0.00 GiB, '8bit' saves 0.00 GiB",
        "finetune: method = 'lora', or freezing what need not be trained, saves most",
    )


def test_no_batch_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError) as raised:
        Device().make_plan(COSTS.fixed_bytes, monkeypatch)
    assert [problem.partition(":")[0] for problem in raised.value.problems] == [
        "memory.budget",
        "optim.moments",
        "finetune",
    ]


def test_a_batch_that_was_tried_is_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(missed=lambda _: MOST)
    with pytest.raises(PlanError) as raised:
        device.make_plan(limit_at(0.5), monkeypatch)
    assert [problem.partition(":")[0] for problem in raised.value.problems] == [
        "memory.budget",
        "optim.moments",
        "finetune",
    ]


def why_nothing_fits(
    layers: int, trained: slice, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """Layers of 1 GiB, some of them trained, in 1 GiB."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2**14, 2**14, bias=False) for _ in range(layers)))
    one = Task(model, lambda model, batch: Loss(torch.zeros(())))
    held = SimpleNamespace(
        task=one,
        optimizer=SimpleNamespace(
            parameters=dict(list(model.named_parameters())[trained]), config=OptimConfig(lr=1.0)
        ),
    )
    monkeypatch.setattr(plan, "try_rehearsal", lambda *_, **__: None)
    with pytest.raises(PlanError) as raised:
        make_plan(cast(Any, held), forwards_of(one), [Batch({}, 8)], 2**30, quiet())
    return raised.value.problems


def test_weights_and_gradients_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_nothing_fits(1, slice(None), monkeypatch) == (
        "memory.budget: no plan fits 1.00 GiB, and no block to recompute; weights and"
        " gradients take 2.00 GiB, the optimizer's state 2.00 GiB",
        "optim.moments: 'bf16' saves 1.00 GiB, '8bit' saves 1.50 GiB",
        "finetune: method = 'lora', or freezing what need not be trained, saves most",
    )


def test_freezing_is_no_advice_where_most_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_nothing_fits(3, slice(1), monkeypatch) == (
        "memory.budget: no plan fits 1.00 GiB, and no block to recompute; weights and"
        " gradients take 4.00 GiB, the optimizer's state 2.00 GiB",
        "optim.moments: 'bf16' saves 1.00 GiB, '8bit' saves 1.50 GiB",
    )


def test_measuring_that_hits_the_limit_is_an_error_with_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(plan, "try_rehearsal", lambda *_, **__: None)
    monkeypatch.setattr(plan, "measure_costs", out_of_memory)
    one = task()
    with pytest.raises(PlanError, match=r"no plan fits 1\.00 GiB") as raised:
        make_plan(step_of(one), forwards_of(one), [Batch({}, 8)], 2**30, quiet())
    assert raised.value.problems[-1].startswith("`fastft plan RUN.toml --no-device` estimates")
    # What an earlier measurement found is still said.
    for limit in (LEAST // 2, COSTS.fixed_bytes // 2):
        with pytest.raises(PlanError, match="the least peak is"):
            make_plan(step_of(one), forwards_of(one), [Batch({}, 8)], limit, quiet(), COSTS)


def test_blocks_that_were_not_called_are_in_the_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or the plan could not be replayed."""
    costs = replace(COSTS, blocks=COSTS.blocks[:-1])
    peaks = iter([None, *[Rehearsal(LEAST, 0.1)] * 8])
    monkeypatch.setattr(plan, "try_rehearsal", lambda *_, **__: next(peaks))
    monkeypatch.setattr(plan, "measure_costs", lambda *_, **__: costs)
    one = task()
    forwards = forwards_of(one)
    found = make_plan(step_of(one), forwards, [Batch({}, 8)], limit_at(0.5), quiet())
    found.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", forwards) == found


def test_each_block_has_its_own_menu(tmp_path: Path) -> None:
    blocks = [Block("0", nn.Identity(), compile=False), Block("1", nn.Identity())]
    one = replace(task(2), blocks=blocks)
    forwards = BlockForwards(one, "blocks", make_precision("fp32", CPU))
    path = tmp_path / "plan.json"
    shared = [KEEP.name, OFFLOAD.name, RECOMPUTE.name, "recompute all, inputs on the host"]
    for ways in (["keep matmuls", "keep 50%"], *([way, way] for way in shared)):
        saved = Plan(2**30, dict(zip("01", ways, strict=True)))
        saved.save(path)
        assert load_plan(path, forwards) == saved
    Plan(2**30, {"0": "keep 50%", "1": "keep matmuls"}).save(path)
    with pytest.raises(PlanError) as raised:
        load_plan(path, forwards)
    assert raised.value.problems == (
        f"{path}: 'keep 50%' is no way to run the block '0' with step.compile = 'blocks'; did you"
        " mean 'keep all'?",
        f"{path}: 'keep matmuls' is no way to run the block '1' with step.compile = 'blocks'; did"
        " you mean 'keep all'?",
    )


def test_a_saved_plan_reads_back(tmp_path: Path) -> None:
    ways = {f"{i}": WAYS[i % 2] for i in range(BLOCKS)}
    saved = Plan(80 * 10**9, ways, 79 * 10**9, 0.25, 70 * 2**30, 0.3)
    saved.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", forwards_of(task())) == saved
    assert saved.summary() == (
        "memory plan: 6 x keep all, 6 x recompute pointwise; peak 70.00 of 74.51 GiB;"
        " 300 ms per step"
    )
    hosted = replace(saved, seconds=None, host_bytes=3 * 2**30)
    assert hosted.summary().endswith("of 74.51 GiB; 3.00 GiB on the host; 250 ms per step")
    assert Plan(2**30, {}).summary() == "memory plan: no blocks; peak 0.00 of 1.00 GiB"


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("{", ["must be a plan.json that fastft wrote; Expecting property name enclosed in ..."]),
        ("[1]", ["must be a plan.json that fastft wrote; ...; delete it for a new plan"]),
        ('{"ways": {}}', ["must be a plan.json that ...'budget_bytes'; delete it for a new plan"]),
        (
            '{"budget_bytes": 1, "ways": {}, "a": 1}',
            ["must be a plan.json that ... argument 'a'; delete it for a new plan"],
        ),
        *(
            (
                json.dumps({"budget_bytes": 1, "ways": dict.fromkeys("01", "keep all"), name: odd}),
                [
                    f"must be a plan.json that fastft wrote; '{name}' must be a number; got"
                    f" {odd!r}; delete it for a new plan"
                ],
            )
            for name, odd in {
                "budget_bytes": None,
                "peak_bytes": "80GB",
                "predicted_seconds": [1],
                "host_bytes": None,
            }.items()
        ),
        (
            '{"budget_bytes": 1, "ways": {"0": "keep all", "2": "keep all"}}',
            [
                "must name the blocks of this model; 2 differ, the first is '1'; delete it for a"
                " new plan"
            ],
        ),
        (
            '{"budget_bytes": 1, "ways": {"0": "keep 50%", "1": "keep 50%"}}',
            [
                "'keep 50%' is no way to run the block '0' with step.compile = 'off'; did you mean"
                " 'keep all'?"
            ],
        ),
        (
            '{"budget_bytes": 1, "ways": {"0": "keep mats", "3": "keep all"}}',
            [
                "must name the blocks of this model; 2 differ, the first is '1'; delete it for a"
                " new plan",
                "'keep mats' is no way to run the block '0' with step.compile = 'off'; did you"
                " mean 'keep matmuls'?",
            ],
        ),
        ('{"budget_bytes": 1, "ways": ["0", "1"]}', ["must be a plan.json that fastft wrote; ..."]),
        ('{"budget_bytes": 1, "ways": null}', ["must be a plan.json that fastft wrote; ..."]),
        (
            '{"budget_bytes": 1, "ways": {"0": 1, "1": ["keep all"]}}',
            ["must be a plan.json that fastft wrote; ..."],
        ),
    ],
)
def test_plans_that_cannot_be_replayed(content: str, problems: list[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError) as raised:
        load_plan(path, forwards_of(task(2)))
    assert len(raised.value.problems) == len(problems)
    for found, expected in zip(raised.value.problems, problems, strict=True):
        start, _, end = f"{path}: {expected}".partition("...")
        assert found.startswith(start)
        assert found.endswith(end)
        assert "..." in expected or found == start


def test_a_plan_for_compiled_blocks_is_none_for_eager_ones(tmp_path: Path) -> None:
    one = task(2)
    Plan(1, {"0": "keep 50%", "1": "keep all"}).save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", forwards_of(one, "blocks")).ways["0"] == "keep 50%"
    Plan(1, dict.fromkeys("01", "keep matmuls")).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"'keep matmuls' is no way to .*compile = 'blocks'; did"):
        load_plan(tmp_path / "plan.json", forwards_of(one, "blocks"))
