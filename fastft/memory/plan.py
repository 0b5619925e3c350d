"""From a budget in bytes to what each block keeps: measured, solved, tried, corrected."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from fastft.blocks import KEEP, LEAST, RECOMPUTE, BlockForwards
from fastft.config import RunConfig
from fastft.errors import PlanError
from fastft.memory.budget import (
    enforced_limit,
    nothing_fits,
    out_of_memory_explained,
    planned_room,
)
from fastft.memory.measure import (
    assemble_costs,
    capture_calls,
    differentiates_twice,
    measure_rest,
    update_seconds,
)
from fastft.memory.menu import WORTH, Menu
from fastft.memory.meter import DeviceMeter
from fastft.memory.rehearsal import as_trained_in_the_end, free_cached, try_rehearsal
from fastft.memory.saved_plan import Plan, load_plan
from fastft.memory.solve import (
    Solution,
    StepCosts,
    host_bytes,
    peak_bytes,
    solve,
    step_seconds,
)
from fastft.offload import HostMemoryError
from fastft.step import TrainingStep
from fastft.task import Batch

_ATTEMPTS = 8
# By how much a plan after one that hit the limit must be smaller: the second, and those after it.
_FIRST_STEP, _STEP = 0.01, 0.02
_THRASHES = (
    "memory: only a step fits in which the allocator gives memory back and begins again; a larger"
    " memory.budget is faster"
)


def measure_costs(
    step: TrainingStep,
    forwards: BlockForwards,
    batches: Sequence[Batch],
    say: Callable[[str], object] = lambda text: None,
    *,
    offload: bool = True,
    limits: Sequence[int] = (),
) -> StepCosts:
    """A step's menu, measured on the device; leaves every block keeping the least.

    Args:
        say: told of ways that a block cannot run.
        offload: with the ways that use the host's memory, which takes seconds to be pinned.
        limits: bytes that the allocator may take, for which compiled blocks are compiled to keep
            less (see `menu`).

    Raises:
        PlanError: a block cannot be run a second time.
    """
    try:
        # The first step compiles, makes the optimizer's state and the workspaces of libraries.
        names = _menu(step, forwards, batches, say, offload)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PlanError(
            "memory.plan: blocks must be able to run a second time in the backward pass; got"
            f" {str(error).splitlines()[0]}; set memory.plan = 'off' and lower data.batch_size"
        ) from error
    meter = DeviceMeter(step.precision.device)
    rest = measure_rest(step, batches, meter)
    calls = capture_calls(step, batches[0])
    menu = Menu(step.task, forwards, calls, names, meter, say=say)
    with step.rehearsal():
        blocks, most = menu.measure().values(), forwards.host.limit_bytes
        for way in names[:-1]:
            if sum(choices[way].host_bytes for choices in blocks if way in choices) > most:
                say(f"memory: '{way}' would take more than half of the host's free memory")
                menu.drop(way)
        costs = menu.measure_for(
            [planned_room(limit) for limit in limits],
            lambda choices: assemble_costs(step, rest, choices, len(batches)),
        )
    del menu, calls
    free_cached()
    update = update_seconds(step, meter)
    other = costs.other_seconds + update
    return replace(costs, other_seconds=other, update_seconds=update)


def _menu(
    step: TrainingStep,
    forwards: BlockForwards,
    batches: Sequence[Batch],
    say: Callable[[str], object],
    offload: bool,
) -> list[str]:
    """Rehearses a step and names the ways to measure; the last is in use.

    Ways that offload are left out where the inputs of blocks are too small for it, or too large.
    """
    twice = None
    if offload:
        forwards.use_everywhere(LEAST)
        try:
            twice = differentiates_twice(step, batches)
        except HostMemoryError:
            say(
                "memory: the inputs of all blocks would take more than half of the host's free"
                " memory"
            )
        if twice is False and forwards.host.pinned_bytes:
            return list(forwards.ways)
    forwards.use_everywhere(RECOMPUTE)
    if twice is None:
        twice = differentiates_twice(step, batches)
    if twice:
        return [KEEP.name, RECOMPUTE.name]
    return [name for name, way in forwards.ways.items() if not way.offload]


def make_plan(
    step: TrainingStep,
    forwards: BlockForwards,
    batches: Sequence[Batch],
    limit: int,
    console: Console,
    costs: StepCosts | None = None,
) -> Plan:
    """The fastest plan whose rehearsed step stays within the limit; its ways are in use.

    Everything is kept where that fits. Otherwise the menu is measured, and a plan is solved,
    rehearsed and, where the rehearsal shows another peak than predicted, corrected.

    Args:
        limit: bytes that the allocator may take; see `enforce`.
        costs: from `measure_costs` for this limit, where several are planned for, without the ways
            that offload.

    Raises:
        PlanError: nothing fits; the message says what would.
    """
    if costs is None:
        forwards.use_everywhere(KEEP)
        # There is nothing better than thrashing where no block can recompute.
        found = try_rehearsal(step, batches, limit, may_thrash=not forwards.blocks)
        if found is not None:
            ways = dict(forwards.chosen)
            return Plan(limit, ways, peak_bytes=found.peak_bytes, seconds=found.seconds)
        if not forwards.blocks:
            raise PlanError(nothing_fits(step, None, batches, limit))
        console.print("memory: keeping everything does not fit; measuring what recomputing costs")
    for offload in (False, True):
        best, measured = None, None if offload else costs
        if measured is None:
            free_cached()
            # Its frames hold activations, so nothing is done in a handler.
            with contextlib.suppress(torch.OutOfMemoryError):
                measured = measure_costs(
                    step, forwards, batches, console.print, offload=offload, limits=[limit]
                )
        if measured is not None:
            called = {block.name for block in measured.blocks}
            # Nothing is known of a block that the model does not call as a module.
            forwards.use({name: KEEP.name for name in forwards.blocks if name not in called})
            say = console.print if offload else None
            best, costs = _search(step, forwards, batches, limit, measured, say)
        if best is not None:
            forwards.use(best.ways)
            return best
        if not offload:
            console.print("memory: recomputing does not suffice; measuring with the host's memory")
    raise PlanError(nothing_fits(step, costs, batches, limit))


def _search(
    step: TrainingStep,
    forwards: BlockForwards,
    batches: Sequence[Batch],
    limit: int,
    costs: StepCosts,
    say: Callable[[str], object] | None,
) -> tuple[Plan | None, StepCosts]:
    """Solves, rehearses, corrects the model by what the rehearsal shows, and solves again.

    Keeping the least comes last: it has been rehearsed while it was measured. A plan that promises
    little over the best is not tried. Returns the corrected costs too.

    Args:
        say: told that only steps fit in which the allocator waits for copies to the host to end,
            and gives memory back; None: such steps do not fit.
    """
    room, less, best, thrashing = planned_room(limit), _FIRST_STEP, None, None
    # The least that hit the limit.
    failed = math.inf
    tried: list[Mapping[str, str]] = []
    frugal = Solution(tuple(len(block.choices) - 1 for block in costs.blocks), 0, math.inf)
    for attempt in range(_ATTEMPTS + 1):
        solution = solve(costs, room) if attempt < _ATTEMPTS else None
        if solution is None or picked(costs, solution) in tried:
            if best is not None:
                break
            solution = frugal
        ways = picked(costs, solution)
        predicted, seconds = peak_bytes(costs, solution.picks), step_seconds(costs, solution.picks)
        if ways in tried or (best and best.seconds and seconds > (1 - WORTH) * best.seconds):
            break
        tried.append(ways)
        forwards.use(ways)
        found = try_rehearsal(step, batches, limit, may_thrash=say is not None)
        if found is not None:
            # Not `ways`: a block that is never called is not in the costs.
            plan = Plan(
                budget_bytes=limit,
                ways=dict(forwards.chosen),
                predicted_bytes=predicted,
                predicted_seconds=seconds,
                peak_bytes=found.peak_bytes,
                seconds=found.seconds,
                host_bytes=host_bytes(costs, solution.picks),
            )
            if found.thrashes:
                thrashing = _faster(thrashing, plan)
            else:
                best = _faster(best, plan)
        if found is None or found.thrashes:
            failed = min(failed, predicted)
            room, less = round(min(room, predicted) * (1 - less)), _STEP
            continue
        missed = found.peak_bytes - predicted
        costs = replace(
            costs,
            fixed_bytes=max(0, costs.fixed_bytes + missed),
            other_seconds=costs.other_seconds + found.seconds - seconds,
        )
        failed += missed
        if failed < math.inf:
            room = round((found.peak_bytes + failed) / 2)
    if best is None and thrashing is not None and say is not None:
        say(_THRASHES)
        best = thrashing
    return best, costs


def _faster(best: Plan | None, plan: Plan) -> Plan:
    """By their rehearsals."""
    return plan if best is None or (plan.seconds or 0) < (best.seconds or 0) else best


def picked(costs: StepCosts, solution: Solution) -> dict[str, str]:
    """Block name -> way."""
    return {
        block.name: block.choices[pick].name
        for block, pick in zip(costs.blocks, solution.picks, strict=True)
    }


def plan_memory(
    config: RunConfig,
    step: TrainingStep,
    forwards: BlockForwards,
    example: Callable[[], Batch],
    staged: Iterable[str],
    console: Console,
    *,
    resumed: bool,
) -> Plan | None:
    """Decides what the run's blocks keep, as `[memory]` says, and enforces the budget.

    The optimizer's state is dropped after it: restore a checkpoint later.

    Args:
        example: makes a batch as the run will see.
        staged: parameters that are frozen now and trained later; planned as if trained.
        resumed: go on with the plan in the run folder, if its peak still fits.

    Raises:
        PlanError: no plan fits, or the one to replay is for another model.
    """
    device, memory = step.precision.device, config.memory
    saved = config.run.folder / "plan.json"
    on_gpu = device.type == "cuda"
    if memory.budget is not None and not on_gpu:
        console.print("memory.budget: only counts on a GPU; this run is on a CPU")
    limit = enforced_limit(memory, device) if on_gpu else 0
    if isinstance(memory.plan, Path):
        return _replay(load_plan(memory.plan, forwards), forwards, saved, console)
    needless = memory.budget is None and not forwards.blocks
    if memory.plan == "off" or not on_gpu or needless:
        return None
    if resumed and saved.exists():
        found = load_plan(saved, forwards)
        if (found.peak_bytes or 0) <= limit:
            return _replay(found, forwards, saved, console)
    # As many as a step holds; from the second on they are alike.
    with out_of_memory_explained():
        held = [example().to(device) for _ in range(config.accumulate)]
    with as_trained_in_the_end(config, step, staged):
        plan = make_plan(step, forwards, held[:2], limit, console)
        if len(held) > 2:
            # Two were rehearsed, and one update.
            once = update_seconds(step, DeviceMeter(device))
            times = {"seconds": plan.seconds, "predicted_seconds": plan.predicted_seconds}
            times = {k: v and once + (v - once) * len(held) / 2 for k, v in times.items()}
            plan = replace(plan, **times)
    # The run begins as its plan was rehearsed.
    free_cached()
    plan.save(saved)
    console.print(plan.summary())
    return plan


def _replay(plan: Plan, forwards: BlockForwards, saved: Path, console: Console) -> Plan:
    forwards.use(plan.ways)
    plan.save(saved)
    console.print(plan.summary())
    return plan
