"""`data.batch_size = "fit"`: the largest micro-batch that fits, for a wanted number of samples."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from rich.console import Console

from fastft.blocks import KEEP, RECOMPUTE, BlockForwards, Way
from fastft.checkpoint import latest_checkpoint
from fastft.config import RunConfig
from fastft.data import SourceLoader, open_loader
from fastft.errors import ConfigError, PlanError
from fastft.memory.budget import enforced_limit, planned_room
from fastft.memory.rehearsal import as_trained_in_the_end, free_cached, try_rehearsal
from fastft.runfile import read_run_file
from fastft.runtime import RUN_FILE
from fastft.step import TrainingStep
from fastft.task import Adapter


def fitted_before(config: RunConfig) -> RunConfig:
    """With the micro-batch of the run's checkpoints, if it has any and that is one for it."""
    path, samples = config.run.folder / RUN_FILE, config.data.samples_per_step
    if config.data.batch_size != "fit" or samples is None or not path.exists():
        return config
    # A start that saved nothing leaves a run file too, such as one that ran out of memory.
    if latest_checkpoint(config.run.folder) is None:
        return config
    size = read_run_file(path).data.micro_batch
    return config if samples % size else with_batch_size(config, size)


def with_batch_size(config: RunConfig, size: int) -> RunConfig:
    """The same samples per step in micro-batches of another size."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


def fit_batch(
    config: RunConfig,
    step: TrainingStep,
    forwards: BlockForwards,
    adapter: Adapter,
    loader: SourceLoader,
    staged: Iterable[str],
    console: Console,
) -> tuple[RunConfig, SourceLoader]:
    """The run with the largest micro-batch that divides `data.samples_per_step` and fits.

    Fits with everything kept; where not even one sample does, with every block recomputed, unless
    `memory.plan` is 'off': then that is not how the run goes.

    Args:
        loader: of the run; returned as it is where `data.batch_size` is a number.
        staged: parameters that are frozen now and trained later.

    Raises:
        ConfigError: there is no GPU to fit into.
        PlanError: not even one sample fits.
    """
    samples, device = config.data.samples_per_step, step.precision.device
    if config.data.batch_size != "fit" or samples is None:
        return config, loader
    if device.type != "cuda":
        raise ConfigError(
            "data.batch_size: 'fit' needs a GPU to fit into; this run is on a CPU; set a number"
        )
    limit = planned_room(enforced_limit(config.memory, device))
    sizes = [n for n in range(1, samples + 1) if samples % n == 0 and n <= loader.samples]

    def fits(size: int) -> bool:
        data = with_batch_size(config, size).data
        example = open_loader(adapter, data, seed=config.run.seed, device=device).example()
        try:
            # As many as a step holds.
            held = [example.to(device) for _ in range(samples // size)]
        except torch.OutOfMemoryError:
            return False
        return try_rehearsal(step, held[:2], limit) is not None

    planned = config.memory.plan != "off"
    with as_trained_in_the_end(config, step, staged):
        size = _largest(sizes, KEEP, forwards, fits)
        if not size and planned:
            size = _largest(sizes, RECOMPUTE, forwards, fits)
    # What did not fit has left memory in pieces.
    free_cached()
    if config.step.compile != "off":
        # Graphs that have seen several sizes are slower than one made for the last.
        torch._dynamo.reset()
    if not size and not planned:
        raise PlanError(
            "data.batch_size: not even one sample fits with everything kept; set memory.plan ="
            " 'auto', or raise memory.budget"
        )
    if not size:
        raise PlanError(
            "data.batch_size: not even one sample fits with every block recomputed; raise"
            " memory.budget, or see `fastft plan` with data.batch_size=1 for what helps"
        )
    console.print(f"data.batch_size: {size} fits; {samples // size} micro-batches per step")
    config = with_batch_size(config, size)
    return config, open_loader(adapter, config.data, seed=config.run.seed, device=device)


def _largest(
    sizes: Sequence[int], way: Way, forwards: BlockForwards, fits: Callable[[int], bool]
) -> int:
    """The largest size that fits when every block runs this way, 0 where none does."""
    forwards.use_everywhere(way)
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else 0
