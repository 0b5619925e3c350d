"""From a budget in bytes to what each block keeps: measured, solved, tried, corrected."""

import gc
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from fastft.atomic import write_file_atomically
from fastft.blocks import KEEP, RECOMPUTE, BlockForwards
from fastft.config import RunConfig, parse_bytes
from fastft.errors import PlanError, nearest
from fastft.memory.measure import (
    assemble_costs,
    capture_calls,
    measure_blocks,
    measure_rest,
    rehearse,
)
from fastft.memory.meter import DeviceMeter
from fastft.memory.solve import Solution, StepCosts, peak_bytes, smallest_peak, solve
from fastft.optim import MOMENT_BYTES, state_bytes
from fastft.step import TrainingStep
from fastft.task import Batch

# What the allocator may lose to rounding and gaps between tensors.
SLACK = 0.01
_ATTEMPTS = 6
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What each block of a run keeps.

    Attributes:
        budget_bytes: what torch's allocator may take.
        ways: block name -> name of a way (see `fastft.blocks`).
        predicted_bytes, predicted_seconds: of a step by the model; None where it was not needed.
        peak_bytes: highest allocation in a rehearsed step; None where none was rehearsed.
    """

    budget_bytes: int
    ways: Mapping[str, str]
    predicted_bytes: int | None = None
    predicted_seconds: float | None = None
    peak_bytes: int | None = None

    def save(self, path: Path) -> None:
        """Writes JSON that `load_plan` reads."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_file_atomically(path, lambda temporary: temporary.write_text(text))

    def summary(self) -> str:
        """One line: how many blocks run which way, peak and budget."""
        counts: dict[str, int] = {}
        for way in self.ways.values():
            counts[way] = counts.get(way, 0) + 1
        blocks = ", ".join(f"{count} x {way}" for way, count in counts.items()) or "no blocks"
        peak = self.peak_bytes or self.predicted_bytes or 0
        return f"memory plan: {blocks}; peak {peak / GIB:.2f} of {self.budget_bytes / GIB:.2f} GiB"


def load_plan(path: Path, forwards: BlockForwards) -> Plan:
    """Reads a plan for these blocks.

    Raises:
        PlanError: not a plan, or one for other blocks or another `step.compile`.
    """
    try:
        plan = Plan(**json.loads(path.read_text()))
        ways = plan.ways
        if not (isinstance(ways, dict) and all(isinstance(way, str) for way in ways.values())):
            raise TypeError("its ways must be names of ways by block")
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(f"{path}: must be a plan.json that fastft wrote; {error}") from error
    blocks = forwards.blocks
    problems = []
    if set(plan.ways) != set(blocks):
        odd = sorted(set(plan.ways) ^ set(blocks))
        problems.append(
            f"{path}: must name the blocks of this model; {len(odd)} differ, the first is"
            f" '{odd[0]}'; make a new plan"
        )
    problems += [
        f"{path}: '{way}' is no way to run a block with step.compile = '{forwards.mode}'"
        f"{nearest(way, forwards.ways)}"
        for way in dict.fromkeys(plan.ways.values())
        if way not in forwards.ways
    ]
    if problems:
        raise PlanError(problems)
    return plan


def budget_bytes(wanted: int | None, device: torch.device) -> int:
    """What the allocator may take: the budget without what CUDA and other processes hold.

    Raises:
        PlanError: the device has less.
    """
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    if wanted is not None and wanted > total:
        raise PlanError(
            f"memory.budget: must be at most what the device has; got {wanted / 1e9:.1f} GB of"
            f" {total / 1e9:.1f} GB; lower it"
        )
    return (total if wanted is None else wanted) - outside


def enforce(limit: int, device: torch.device) -> None:
    """Makes every allocation beyond the limit fail, so that "fits" is a fact on a larger card."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def measure_costs(
    step: TrainingStep, forwards: BlockForwards, batches: Sequence[Batch]
) -> StepCosts:
    """The whole menu, measured on the device; leaves every block recomputing all."""
    forwards.use_everywhere(RECOMPUTE)
    # The first compiles, makes the optimizer's state and the workspaces of libraries.
    rehearse(step, batches)
    calls = capture_calls(step, batches[0])
    meter = DeviceMeter(step.precision.device)
    with step.rehearsal():
        measured = measure_blocks(step, forwards, calls, list(forwards.ways), meter)
    del calls
    _clean()
    return assemble_costs(step, measure_rest(step, batches, meter), measured, len(batches))


def make_plan(
    step: TrainingStep,
    forwards: BlockForwards,
    batches: Sequence[Batch],
    limit: int,
    console: Console,
) -> Plan:
    """The fastest plan whose rehearsed step stays within the limit; its ways are in use.

    Everything is kept where that fits. Otherwise the menu is measured, and a plan is solved,
    rehearsed and, where the rehearsal shows another peak than predicted, corrected.

    Args:
        limit: bytes that the allocator may take; see `enforce`.

    Raises:
        PlanError: nothing fits; the message says what would.
    """
    forwards.use_everywhere(KEEP)
    peak = _try(step, batches, limit)
    if peak is not None:
        return Plan(limit, dict(forwards.chosen), peak_bytes=peak)
    if not forwards.blocks:
        raise PlanError(nothing_fits(step, None, batches, limit))
    console.print("memory: keeping everything does not fit; measuring what recomputing costs")
    _clean()
    try:
        costs = measure_costs(step, forwards, batches)
    except torch.OutOfMemoryError as error:
        raise PlanError(nothing_fits(step, None, batches, limit)) from error.with_traceback(None)
    best = _search(step, forwards, batches, limit, costs)
    if best is None:
        raise PlanError(nothing_fits(step, costs, batches, limit))
    forwards.use(best.ways)
    return best


def _search(
    step: TrainingStep,
    forwards: BlockForwards,
    batches: Sequence[Batch],
    limit: int,
    costs: StepCosts,
) -> Plan | None:
    """Solves, rehearses, corrects the model by what the rehearsal shows, and solves again."""
    room, best = round(limit * (1 - SLACK)), None
    tried: list[Mapping[str, str]] = []
    for _ in range(_ATTEMPTS):
        solution = solve(costs, room)
        if solution is None or (ways := picked(costs, solution)) in tried:
            break
        tried.append(ways)
        forwards.use(ways)
        peak = _try(step, batches, limit)
        if peak is None:
            room = round(min(room, solution.peak_bytes) * 0.98)
            continue
        if best is None or solution.seconds < (best.predicted_seconds or 0):
            # Not `ways`: a block that is never called is not in the costs.
            chosen = dict(forwards.chosen)
            best = Plan(limit, chosen, solution.peak_bytes, solution.seconds, peak)
        missed = peak - solution.peak_bytes
        costs = replace(costs, fixed_bytes=max(0, costs.fixed_bytes + missed))
    return best


def picked(costs: StepCosts, solution: Solution) -> dict[str, str]:
    """Block name -> way."""
    return {
        block.name: block.choices[pick].name
        for block, pick in zip(costs.blocks, solution.picks, strict=True)
    }


def _try(step: TrainingStep, batches: Sequence[Batch], limit: int) -> int | None:
    """The peak of the second of two rehearsals, None where the limit was hit."""
    device = step.precision.device
    try:
        rehearse(step, batches)
        before = torch.cuda.memory_stats(device)["num_alloc_retries"]
        torch.cuda.reset_peak_memory_stats(device)
        rehearse(step, batches)
    except torch.OutOfMemoryError as error:
        # Its frames hold the activations.
        error.__traceback__ = None
        fits = False
    else:
        # A retry means that the allocator gave everything back and began again: it thrashes.
        fits = torch.cuda.memory_stats(device)["num_alloc_retries"] == before
    peak = torch.cuda.max_memory_allocated(device)
    if not fits or peak > limit:
        _clean()
        return None
    return peak


def _clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def nothing_fits(
    step: TrainingStep, costs: StepCosts | None, batches: Sequence[Batch], limit: int
) -> list[str]:
    """What is missing, and what would help."""
    parameters = step.optimizer.parameters.values()
    trained = sum(p.numel() for p in parameters)
    held = sum(p.nbytes for p in (*step.task.model.parameters(), *parameters))
    config = step.optimizer.config
    now = state_bytes(config)
    lines = [
        f"memory.budget: no plan fits {limit / GIB:.2f} GiB, even with every block recomputed;"
        f" weights and gradients take {held / GIB:.2f} GiB, the optimizer's state"
        f" {now * trained / GIB:.2f} GiB"
    ]
    if costs is not None:
        least, picks = smallest_peak(costs)
        assert peak_bytes(costs, picks) == least
        size = batches[0].size
        activations = least - costs.fixed_bytes
        room = limit * (1 - SLACK) - costs.fixed_bytes
        lines[0] += f"; the least peak is {least / GIB:.2f} GiB"
        if room > 0 and activations > 0 and 1 <= (fitting := int(size * room / activations)) < size:
            lines.append(
                f"data.batch_size: about {fitting} of {size} would fit; set it and raise"
                " step.accumulate to keep the batch"
            )
    savings = [
        f"'{layout}' saves {(now - size) * trained / GIB:.2f} GiB"
        for layout, size in MOMENT_BYTES.items()
        if config.name in ("adam", "adamw") and size < now
    ]
    if savings:
        lines.append(f"optim.moments: {', '.join(savings)}")
    lines.append("finetune: method = 'lora', or freezing what need not be trained, saves most")
    return lines


def plan_memory(
    config: RunConfig,
    step: TrainingStep,
    forwards: BlockForwards,
    example: Batch,
    staged: Iterable[str],
    console: Console,
    *,
    resumed: bool,
) -> Plan | None:
    """Decides what the run's blocks keep, as `[memory]` says, and enforces the budget.

    The optimizer's state is dropped after it: restore a checkpoint later.

    Args:
        example: a batch as the run will see, on any device.
        staged: parameters that are frozen now and trained later; planned as if trained.
        resumed: go on with the plan in the run folder, if there is one.

    Raises:
        PlanError: no plan fits, or the one to replay is for another model.
    """
    device, memory = step.precision.device, config.memory
    saved = config.run.folder / "plan.json"
    if isinstance(memory.plan, Path) or (resumed and saved.exists()):
        plan = load_plan(memory.plan if isinstance(memory.plan, Path) else saved, forwards)
        forwards.use(plan.ways)
        if device.type == "cuda" and memory.budget is not None:
            enforce(budget_bytes(parse_bytes(memory.budget), device), device)
        return plan
    if device.type != "cuda":
        if memory.budget is not None:
            console.print("memory.budget: only counts on a GPU; this run is on a CPU")
        return None
    wanted = None if memory.budget is None else parse_bytes(memory.budget)
    limit = budget_bytes(wanted, device)
    if wanted is not None:
        enforce(limit, device)
    if memory.plan == "off":
        return None
    batches = [example.to(device)] * min(2, config.step.accumulate)
    frozen = [step.optimizer.parameters[name] for name in staged]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        plan = make_plan(step, forwards, batches, limit, console)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        step.optimizer.forget()
    plan.save(saved)
    console.print(plan.summary())
    return plan
