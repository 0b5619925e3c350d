"""Whole steps tried before the first one: whether they fit, how long they take."""

import contextlib
import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from fastft.config import RunConfig
from fastft.finetune import set_train_mode
from fastft.memory.measure import rehearse, update_seconds
from fastft.memory.meter import DeviceMeter
from fastft.offload import HostMemoryError
from fastft.step import TrainingStep
from fastft.task import Batch


class Rehearsal(NamedTuple):
    """What a rehearsed step took, measured.

    Attributes:
        thrashes: the allocator gave everything back in it and began again.
    """

    peak_bytes: int
    seconds: float
    thrashes: bool = False


def try_rehearsal(
    step: TrainingStep, batches: Sequence[Batch], limit: int, *, may_thrash: bool = False
) -> Rehearsal | None:
    """The second of two rehearsals, None where a limit was hit, of the host's too.

    Args:
        may_thrash: whether a step fits that does.
    """
    device = step.precision.device
    seconds, retries = None, 0
    # What another plan has left would lie between this one's tensors.
    free_cached()
    try:
        rehearse(step, batches)
        before = torch.cuda.memory_stats(device)["num_alloc_retries"]
        torch.cuda.reset_peak_memory_stats(device)
        meter = DeviceMeter(device)
        with step.rehearsal():
            seconds = meter.seconds(lambda: step(0, batches), repeats=3)
        seconds += update_seconds(step, meter)
        retries = torch.cuda.memory_stats(device)["num_alloc_retries"] - before
    except (torch.OutOfMemoryError, HostMemoryError) as error:
        # Its frames hold the activations.
        error.__traceback__ = None
        # It may have come while the optimizer made its state.
        step.optimizer.forget()
    peak = torch.cuda.max_memory_allocated(device)
    if seconds is None or peak > limit or (retries and not may_thrash):
        return None
    return Rehearsal(peak, seconds, retries > 0)


def free_cached() -> None:
    """Gives the device what tensors no longer use."""
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def as_trained_in_the_end(
    config: RunConfig, step: TrainingStep, staged: Iterable[str]
) -> Iterator[None]:
    """Rehearsals in this context train what is unfrozen later, too; the optimizer forgets them.

    Args:
        staged: parameters that are frozen now and trained later.
    """
    frozen = [step.optimizer.parameters[name] for name in staged]
    model, method = step.task.model, config.finetune.method
    for parameter in frozen:
        parameter.requires_grad_(True)
    set_train_mode(model, method)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        set_train_mode(model, method)
        step.optimizer.forget()
