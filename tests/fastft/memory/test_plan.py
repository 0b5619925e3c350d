"""Plans: found on a simulated device, refused with advice, saved and replayed."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn

from fastft.blocks import EAGER, KEEP, OFFLOAD, RECOMPUTE, BlockForwards
from fastft.config import GradientsConfig, OptimConfig, RunConfig, parse_bytes
from fastft.errors import PlanError
from fastft.memory import Plan, budget, load_plan, make_plan, plan, plan_memory
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
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.runfile import parse
from fastft.step import TrainingStep
from fastft.task import Batch, Block, Loss, Task

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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


def task(blocks: int = BLOCKS) -> Task:
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


def picks(ways: Mapping[str, str]) -> list[int]:
    return [WAYS.index(ways[block.name]) for block in COSTS.blocks]


@dataclass
class Device:
    """A device whose true peak is the model's and what `missed` says; `hits` fails plans.

    Attributes:
        tried: the picks and the true peak of each rehearsal, None where it hit the limit.
    """

    missed: Callable[[Sequence[int]], float] = lambda picks: 0
    hits: Callable[[Sequence[int]], bool] = lambda picks: False
    tried: list[tuple[list[int], int | None]] = field(default_factory=list)

    def true_peak(self, chosen: Sequence[int]) -> int:
        return peak_bytes(COSTS, chosen) + round(self.missed(chosen))

    def make_plan(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
        """The plan that is found, which must be in use and within the limit."""
        one = task()
        forwards = forwards_of(one)

        def rehearse(
            step: TrainingStep, batches: Sequence[Batch], limit: int, *, may_thrash: bool = False
        ) -> Rehearsal | None:
            assert not may_thrash
            chosen = picks(forwards.chosen)
            peak = self.true_peak(chosen)
            fits = peak <= limit and not self.hits(chosen)
            self.tried.append((chosen, peak if fits else None))
            return Rehearsal(peak, step_seconds(COSTS, chosen)) if fits else None

        monkeypatch.setattr(plan, "try_rehearsal", rehearse)
        monkeypatch.setattr(plan, "measure_costs", lambda *_, **__: COSTS)
        found = make_plan(step_of(one), forwards, [Batch({}, 8)], limit, quiet())
        chosen = picks(found.ways)
        assert forwards.chosen == found.ways
        assert (chosen, found.peak_bytes) in self.tried
        assert found.peak_bytes == self.true_peak(chosen) <= limit
        assert found.budget_bytes == limit
        assert not self.hits(chosen)
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


def test_everything_is_kept_where_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure_costs", lambda *_, **__: pytest.fail("measured for nothing"))
    device = Device()
    with monkeypatch.context() as patched:
        found = device.make_plan(MOST, patched)
    assert set(found.ways.values()) == {KEEP.name}
    assert len(device.tried) == 1
    with pytest.raises(PlanError):
        Device().make_plan(LEAST // 2, monkeypatch)


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


def test_weights_and_gradients_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**14, 2**14, bias=False))
    one = Task(model, lambda model, batch: Loss(torch.zeros(())))
    held = SimpleNamespace(
        task=one,
        optimizer=SimpleNamespace(
            parameters=dict(model.named_parameters()), config=OptimConfig(lr=1.0)
        ),
    )
    monkeypatch.setattr(plan, "try_rehearsal", lambda *_, **__: None)
    with pytest.raises(PlanError) as raised:
        make_plan(cast(Any, held), forwards_of(one), [Batch({}, 8)], 2**30, quiet())
    assert raised.value.problems == (
        "memory.budget: no plan fits 1.00 GiB, and no block to recompute; weights and"
        " gradients take 2.00 GiB, the optimizer's state 2.00 GiB",
        "optim.moments: 'bf16' saves 1.00 GiB, '8bit' saves 1.50 GiB",
        "finetune: method = 'lora', or freezing what need not be trained, saves most",
    )


def test_measuring_that_hits_the_limit_is_an_error_with_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(plan, "try_rehearsal", lambda *_, **__: None)
    monkeypatch.setattr(plan, "measure_costs", out_of_memory)
    one = task()
    with pytest.raises(PlanError, match=r"no plan fits 1\.00 GiB"):
        make_plan(step_of(one), forwards_of(one), [Batch({}, 8)], 2**30, quiet())


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
        ("[1]", ["must be a plan.json that fastft wrote; ..."]),
        ('{"ways": {}}', ["must be a plan.json that fastft wrote; ...'budget_bytes'"]),
        ('{"budget_bytes": 1, "ways": {}, "a": 1}', ["must be a plan.json that ... argument 'a'"]),
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


def make_config(folder: Path, **memory: str) -> RunConfig:
    tree = {
        "run": {"folder": str(folder), "steps": 10},
        "model": {"adapter": "timm"},
        "data": {"train": [{"path": "train.npz"}]},
        "optim": {"lr": 0.1},
        "memory": memory,
    }
    return parse(RunConfig, tree)


def plan_on_cpu(folder: Path, *, resumed: bool = False, **memory: str):
    """What was planned, the ways in use, and what was printed."""
    one, console = task(2), quiet()
    forwards = forwards_of(one)
    config, example = make_config(folder, **memory), Batch({"inputs": torch.ones(2, 2)}, 2)
    found = plan_memory(
        config, step_of(one), forwards, lambda: example, (), console, resumed=resumed
    )
    return found, forwards.chosen, printed(console)


def test_nothing_is_planned_on_a_cpu(tmp_path: Path) -> None:
    assert plan_on_cpu(tmp_path) == (None, {}, "")
    assert plan_on_cpu(tmp_path, budget="80GB") == (
        None,
        {},
        "memory.budget: only counts on a GPU; this run is on a CPU\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_plan_file_is_replayed(tmp_path: Path) -> None:
    saved = Plan(1, {"0": "recompute all", "1": "keep matmuls"})
    saved.save(tmp_path / "my.json")
    found, chosen, _ = plan_on_cpu(tmp_path, plan=str(tmp_path / "my.json"))
    assert found == saved
    assert chosen == saved.ways


def test_only_a_plan_that_is_named_counts_on_a_cpu(tmp_path: Path) -> None:
    saved = Plan(1, dict.fromkeys("01", "recompute all"))
    saved.save(tmp_path / "plan.json")
    assert plan_on_cpu(tmp_path)[0] is None
    assert plan_on_cpu(tmp_path, resumed=True)[:2] == (None, {})
    other = Plan(1, dict.fromkeys("01", "keep matmuls"))
    other.save(tmp_path / "my.json")
    given = plan_on_cpu(tmp_path, resumed=True, plan=str(tmp_path / "my.json"))
    assert given[:2] == (other, other.ways)
    assert given[2] == other.summary() + "\n"
    assert load_plan(tmp_path / "plan.json", forwards_of(task(2))) == other


@dataclass
class Gpu:
    """Stands in for a GPU of 80 GB, 6 of them taken by others and CUDA; notes what is enforced."""

    monkeypatch: pytest.MonkeyPatch
    enforced: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        memory = SimpleNamespace(total_memory=80 * 10**9)
        for name, value in {
            "mem_get_info": (70 * 10**9, 80 * 10**9),
            "memory_reserved": 4 * 10**9,
            "get_device_properties": memory,
        }.items():
            self.monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        self.monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.enforce)

    def enforce(self, fraction: float, device: torch.device) -> None:
        assert 0 <= fraction <= 1
        self.enforced.append(round(fraction * 80 * 10**9))


# Of a budget of 22 GB.
LIMIT = 22 * 10**9 - 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_a_budget_is_for_all_that_the_run_takes(gpu: Gpu) -> None:
    assert budget.budget_bytes(None, CUDA) == 74 * 10**9
    assert budget.budget_bytes(22 * 10**9, CUDA) == LIMIT
    # What others hold is not taken out of the budget, only out of what there is.
    assert budget.budget_bytes(79 * 10**9, CUDA) == 74 * 10**9
    with pytest.raises(PlanError) as raised:
        budget.budget_bytes(parse_bytes("80.1GB"), CUDA)
    assert raised.value.problems == (
        "memory.budget: must be at most what the device has; got 80.1 GB of 80.0 GB; lower it",
    )
    budget.enforce(20 * 10**9, CUDA)
    budget.enforce(90 * 10**9, CUDA)
    assert gpu.enforced == [20 * 10**9, 80 * 10**9]


def test_a_budget_that_is_taken_already(gpu: Gpu) -> None:
    with pytest.raises(PlanError, match=r"^memory.budget: "):
        budget.budget_bytes(10**9, CUDA)


@pytest.mark.parametrize("fails", [False, True])
def test_planning_on_a_gpu(
    fails: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Staged parameters count as trained, and the optimizer forgets the rehearsals."""
    one = task(2)
    step, forwards, console = step_of(one), forwards_of(one), quiet()
    step(0, [Batch({"inputs": torch.ones(2, 2)}, 2)])
    parameters = step.optimizer.parameters
    staged = ["0.weight", "0.bias"]
    for name in staged:
        parameters[name].requires_grad_(False)
    found = Plan(LIMIT, dict.fromkeys("01", RECOMPUTE.name), peak_bytes=2**30)

    def simulated(step: Any, forwards: Any, batches: Any, limit: int, console: Any) -> Plan:
        assert all(p.requires_grad for p in parameters.values())
        assert limit == LIMIT
        assert gpu.enforced == [limit]
        assert [batch.size for batch in batches] == [8]
        if fails:
            raise PlanError("nothing fits")
        return found

    monkeypatch.setattr(plan, "make_plan", simulated)
    monkeypatch.setattr(step, "precision", replace(step.precision, device=CUDA))
    config = make_config(tmp_path, budget="22GB")
    try:
        plan_memory(config, step, forwards, lambda: Batch({}, 8), staged, console, resumed=False)
    except PlanError:
        assert fails
    else:
        assert load_plan(tmp_path / "plan.json", forwards) == found
        assert printed(console) == found.summary() + "\n"
    assert (tmp_path / "plan.json").exists() is not fails
    assert {n for n, p in parameters.items() if not p.requires_grad} == set(staged)
    assert all(not state for state in step.optimizer.state_dict().values())


def test_micro_batches_on_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two stand for all of them; 'off' plans nothing, and the budget holds all the same."""
    one = task(2)
    step, sizes, seconds = step_of(one), [], []

    def simulated(step: Any, forwards: Any, batches: Any, *_: Any) -> Plan:
        sizes.append(len(batches))
        return Plan(1, {}, seconds=0.1 + len(batches))

    def update(step: TrainingStep, meter: object) -> float:
        """Of a step's time, what the optimizer takes once; it leaves moments and step counts."""
        step(0, [Batch({"inputs": torch.ones(2, 2)}, 2)])
        return 0.1

    monkeypatch.setattr(plan, "make_plan", simulated)
    monkeypatch.setattr(plan, "update_seconds", update)
    monkeypatch.setattr(step, "precision", replace(step.precision, device=CUDA))
    for accumulate in (1, 2, 5):
        config = make_config(tmp_path)
        config = replace(config, step=replace(config.step, accumulate=accumulate))
        found = plan_memory(
            config, step, forwards_of(one), lambda: Batch({}, 8), (), quiet(), resumed=False
        )
        assert found is not None
        seconds.append(found.seconds)
        assert not any(step.optimizer.state_dict().values())
    assert sizes == [1, 2, 2]
    assert seconds == pytest.approx([1.1, 2.1, 5.1])
    assert set(gpu.enforced) == {80 * 10**9}
    config = make_config(tmp_path, plan="off", budget="22GB")
    off = plan_memory(
        config, step, forwards_of(one), lambda: Batch({}, 8), (), quiet(), resumed=False
    )
    assert off is None
    assert len(sizes) == 3
    assert gpu.enforced[-1] == LIMIT


def test_a_resumed_run_goes_on_with_its_plan_while_that_fits(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = task(2)
    step, forwards, console = step_of(one), forwards_of(one), quiet()
    monkeypatch.setattr(step, "precision", replace(step.precision, device=CUDA))
    saved = Plan(1, dict.fromkeys("01", "recompute all"), peak_bytes=LIMIT)
    again = Plan(LIMIT, dict.fromkeys("01", "keep matmuls"), peak_bytes=1)
    monkeypatch.setattr(plan, "make_plan", lambda *_: again)

    def planned(budget: str, *, memory_plan: str = "auto", resumed: bool = True) -> Plan | None:
        saved.save(tmp_path / "plan.json")
        config = make_config(tmp_path, budget=budget, plan=memory_plan)
        return plan_memory(
            config, step, forwards, lambda: Batch({}, 8), (), console, resumed=resumed
        )

    assert planned("22GB") == saved
    assert forwards.chosen == saved.ways
    assert gpu.enforced[-1] == LIMIT
    assert planned("20GB") == again
    assert planned("22GB", resumed=False) == again
    assert planned("22GB", memory_plan="off") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GB", 80 * 10**9),
        ("22GiB", 22 * 2**30),
        ("22 GiB", 22 * 2**30),
        ("74.5GiB", round(74.5 * 2**30)),
        ("0.5 MB", 500_000),
        ("3MiB", 3 * 2**20),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["80", "0GB", "0.0 MiB", "80gb", "lots", "", "-1GB", "80 G", "1e3GB", "8 0GB", " 8GB"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be a size such as '80GB' or '22GiB'; got '"):
        parse_bytes(text)
