"""What `[memory]` of a run does: on a CPU, on a simulated GPU, and when a run goes on."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from linear_blocks import forwards_of, printed, quiet, step_of, task

from fastft.blocks import RECOMPUTE
from fastft.config import RunConfig, parse_bytes
from fastft.errors import PlanError
from fastft.memory import Plan, budget, load_plan, plan, plan_memory
from fastft.runfile import parse
from fastft.step import TrainingStep
from fastft.task import Batch

CUDA = torch.device("cuda")


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
