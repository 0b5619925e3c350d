"""`fastft check`, `stats` and `show`: the data of a run file, and what a checkpoint holds."""

from pathlib import Path

from rich.console import Console

from fastft.adapters.registry import compute_statistics, find_adapter
from fastft.assemble import assemble, check_run_data, open_split
from fastft.checkpoint import describe_checkpoint
from fastft.config import RunConfig
from fastft.data import SourceLoader, open_loader
from fastft.runtime import find_device, seed_everything
from fastft.task import Description


def check(config: RunConfig, console: Console) -> None:
    """Runs the data checks of a run and shows every finding.

    Raises:
        DataError: listing every finding that is an error.
    """
    seed_everything(config.run.seed)
    device = find_device(config.run.device)
    task, adapter = assemble(config, device, console, pretrained=False)
    train = open_loader(adapter, config.data, seed=config.run.seed, device=device)
    loaders: dict[str, SourceLoader] = {"train": train}
    loaders |= {
        split: loader
        for split in ("validation", "test")
        if (loader := open_split(adapter, config, split, device)) is not None
    }
    check_run_data(task, adapter, config, list(loaders.values()), console)
    for split, loader in loaders.items():
        names = ", ".join(loader.names)
        console.print(
            f"{names} ({split}): {loader.samples:,} samples", markup=False, highlight=False
        )


def stats(config: RunConfig, console: Console, most: int) -> None:
    """Prints what the training data's values are normalised by, for a run file."""
    seed_everything(config.run.seed)
    text = compute_statistics(config.model, config.data.train, most)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(path: Path, config: RunConfig | None) -> Description:
    """What a checkpoint holds: as the run file's adapter sees it, or as a table of tensors."""
    own = find_adapter(config.model).describe(path) if config else None
    return own or describe_checkpoint(path)
