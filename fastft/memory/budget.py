"""How much memory a run may take, how that is enforced, and what to say where it is too little."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from fastft.config import MemoryConfig, parse_bytes
from fastft.errors import PlanError
from fastft.memory.solve import StepCosts, smallest_peak
from fastft.optim import MOMENT_BYTES, state_bytes
from fastft.step import TrainingStep
from fastft.task import Batch

GIB = 2**30
# What the allocator may lose to rounding and gaps between tensors.
SLACK = 0.01
# At most this much of what is taken outside of torch's allocator is this process's own: CUDA's
# context and libraries. The rest is other processes'.
_CONTEXT_BYTES = 2**30


def planned_room(limit: int) -> int:
    """Bytes for a planned step's peak, of those that the allocator may take."""
    return round(limit * (1 - SLACK))


def budget_bytes(wanted: int | None, device: torch.device) -> int:
    """What torch's allocator may take, in bytes.

    Args:
        wanted: what the run may take with CUDA's own share; None: all that is free.

    Raises:
        PlanError: the device has less, or CUDA takes all of it.
    """
    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device)
    if wanted is None:
        return there
    if wanted > total:
        raise PlanError(
            f"memory.budget: must be at most what the device has; got {wanted / 1e9:.1f} GB of"
            f" {total / 1e9:.1f} GB; lower it"
        )
    own = min(total - there, _CONTEXT_BYTES)
    if wanted <= own:
        raise PlanError(
            f"memory.budget: must be more than CUDA takes itself, {own / 1e9:.1f} GB; got"
            f" {wanted / 1e9:.1f} GB; raise it"
        )
    return min(wanted - own, there)


def enforce(limit: int | None, device: torch.device) -> None:
    """Makes every allocation beyond the limit fail, so that "fits" is a fact on a larger card.

    Args:
        limit: bytes; None lifts the limit of an earlier run in this process.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = 1.0 if limit is None else min(1.0, limit / total)
    torch.cuda.set_per_process_memory_fraction(fraction, device)


def enforced_limit(config: MemoryConfig, device: torch.device) -> int:
    """What the allocator may take by `memory.budget`, in bytes; from now on it cannot take more."""
    wanted = None if config.budget is None else parse_bytes(config.budget)
    limit = budget_bytes(wanted, device)
    enforce(None if wanted is None else limit, device)
    return limit


@contextlib.contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Says what to change where a step of the run needs more memory than its plan had.

    Raises:
        PlanError: instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        lines = str(error).splitlines()
        raise PlanError(
            f"memory: a later step or evaluation must fit as the first did; got {lines[0]}; lower"
            " data.batch_size, or make a new plan with a smaller memory.budget for more room; CUDA"
            " graphs take memory, too, which step.cuda_graphs = 'off' leaves free"
        ) from error


def nothing_fits(
    step: TrainingStep, costs: StepCosts | None, batches: Sequence[Batch], limit: int
) -> list[str]:
    """What is missing, and what would help."""
    parameters = step.optimizer.parameters.values()
    trained = sum(p.numel() for p in parameters)
    held = sum(p.nbytes for p in (*step.task.model.parameters(), *parameters))
    config = step.optimizer.config
    now = state_bytes(config)
    tried = (
        "even with every block recomputed"
        if step.task.planned_blocks
        else "and no block to recompute"
    )
    lines = [
        f"memory.budget: no plan fits {limit / GIB:.2f} GiB, {tried};"
        f" weights and gradients take {held / GIB:.2f} GiB, the optimizer's state"
        f" {now * trained / GIB:.2f} GiB"
    ]
    if costs is not None:
        least, _ = smallest_peak(costs)
        size = batches[0].size
        activations = least - costs.fixed_bytes
        room = planned_room(limit) - costs.fixed_bytes
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
    # Where little is trained, as with low-rank updates already, freezing more saves little.
    if 2 * trained > sum(p.numel() for p in step.task.model.parameters()):
        lines.append("finetune: method = 'lora', or freezing what need not be trained, saves most")
    if costs is None and step.task.planned_blocks:
        lines.append("`fastft plan RUN.toml --no-device` estimates how much each block takes")
    if costs is not None and (found := _fewest_gpus(step, costs, len(batches), limit)):
        gpus, peak = found
        lines.append(
            "sharding: weights, gradients and the optimizer's state split over"
            f" {gpus} GPUs or more (FSDP) would fit at this batch size on each, an estimated"
            f" {peak / GIB:.1f} GiB per GPU; fastft itself trains on one device so far"
        )
    return lines


def _fewest_gpus(
    step: TrainingStep, costs: StepCosts, micro_batches: int, limit: int
) -> tuple[int, int] | None:
    """Of 2, 4 and 8 GPUs the fewest on which the step fits, and the least peak in bytes on each."""
    if smallest_peak(costs)[0] <= planned_room(limit):
        # The costs miss what was in the way.
        return None
    for gpus in (2, 4, 8):
        peak, _ = smallest_peak(_sharded(step, costs, micro_batches, gpus))
        if peak <= planned_room(limit):
            return gpus, peak
    return None


def _sharded(step: TrainingStep, costs: StepCosts, micro_batches: int, gpus: int) -> StepCosts:
    """The costs on one of several GPUs that split parameters, their gradients and their state.

    FSDP gathers parameters outside of blocks once per step. Of blocks there are three on each GPU,
    counted as the largest: one at work, the next one's parameters on their way, and gradients that
    are being summed.
    """
    parameters = list(step.task.model.parameters())
    blocks = [list(block.module.parameters()) for block in step.task.blocks]
    inside = {p for block in blocks for p in block}
    outside = sum(p.nbytes for p in parameters if p not in inside)
    gathered = outside + 3 * max(sum(p.nbytes for p in block) for block in blocks)
    trained = step.optimizer.parameters.values()
    split = sum(p.nbytes for p in parameters)
    split += round(state_bytes(step.optimizer.config) * sum(p.numel() for p in trained))
    if micro_batches > 1:
        # All gradients are part of the fixed bytes then.
        split += sum(p.nbytes for p in trained if p.requires_grad)
    return dataclasses.replace(
        costs,
        fixed_bytes=max(0, costs.fixed_bytes - split) + split // gpus + gathered,
        tail_gradient_bytes=costs.tail_gradient_bytes // gpus,
        update_bytes=costs.update_bytes // gpus,
        blocks=tuple(
            dataclasses.replace(block, gradient_bytes=block.gradient_bytes // gpus)
            for block in costs.blocks
        ),
    )
