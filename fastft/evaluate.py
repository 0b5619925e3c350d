"""`fastft evaluate` and `fastft export`: a trained model's scores, and its checkpoint."""

import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastft.assemble import assemble, open_split
from fastft.atomic import write_file_atomically
from fastft.blocks import compile_task
from fastft.checkpoint import (
    best_checkpoint,
    is_checkpoint,
    latest_checkpoint,
    read_meta,
    read_weights,
)
from fastft.config import FinetuneConfig, RunConfig
from fastft.errors import CheckpointError, ConfigError
from fastft.finetune import merge_lora
from fastft.fused import fuse_layer_norms
from fastft.loop import score
from fastft.memory import fitted_before
from fastft.metrics import make_metrics
from fastft.names import load_state_dict
from fastft.precision import make_precision
from fastft.runtime import find_device, seed_everything
from fastft.task import Adapter, Split, Task


def evaluate(
    config: RunConfig, console: Console, *, checkpoint: str = "best", split: Split = "validation"
) -> dict[str, float]:
    """Scores a checkpoint on the validation or test data and writes `evaluation-<split>.json`.

    Args:
        checkpoint: 'best', 'latest', a checkpoint folder of a run, or any file with weights.

    Raises:
        FastftError: no such data or checkpoint.
    """
    config, device = fitted_before(config), find_device(config.run.device)
    task, adapter, name = _open_trained(config, checkpoint, device, console)
    loader = open_split(adapter, config, split, device)
    if loader is None:
        raise ConfigError(
            f"data.{split}: must name a data set to evaluate on; got none; add [[data.{split}]]"
        )
    fuse_layer_norms(task, config, device)
    precision = make_precision(config.step.precision, device)
    compile_task(task, config.step.compile, precision)
    metrics = {**task.metrics, **make_metrics(config.evaluate.metrics, device)}
    with loader:
        values = score(task, loader, metrics, precision)
    title = f"{name} on {split} data ({loader.samples:,} samples)"
    # A title must not be folded to the width of a narrow table.
    table = Table(title=Text(title), min_width=min(len(title), console.width))
    table.add_column("metric")
    table.add_column("value", justify="right")
    for metric, value in values.items():
        table.add_row(metric, f"{value:.5g}")
    console.print(table)
    if config.run.folder.is_dir():
        record = {"checkpoint": name, "split": split, "samples": loader.samples, "values": values}
        text = json.dumps(record, indent=2) + "\n"
        path = config.run.folder / f"evaluation-{split}.json"
        write_file_atomically(path, lambda temporary: temporary.write_text(text))
    return values


def export(config: RunConfig, console: Console, target: Path, *, checkpoint: str = "best") -> None:
    """Writes a checkpoint in the format of the model family's own tools; low-rank updates merged.

    Raises:
        FastftError: no such checkpoint, or `target` cannot be written.
    """
    task, adapter, name = _open_trained(config, checkpoint, torch.device("cpu"), console)
    merge_lora(task.model)
    write_file_atomically(target, lambda path: adapter.save(task, path))
    console.print(f"{name} -> {target}", markup=False, highlight=False, soft_wrap=True)


def _open_trained(
    config: RunConfig, checkpoint: str, device: torch.device, console: Console
) -> tuple[Task, Adapter, str]:
    """The task with a checkpoint's weights (averaged ones where it has them), and its name."""
    seed_everything(config.run.seed)
    folder = _find(config, checkpoint, console)
    if folder is None:
        # Someone else's file: the whole model must come from it, with nothing new and no adapters.
        model = dataclasses.replace(config.model, checkpoint=Path(checkpoint), strict=True)
        foreign = dataclasses.replace(config, model=model, finetune=FinetuneConfig())
        return *assemble(foreign, device, console), checkpoint
    task, adapter = assemble(config, device, console, pretrained=False)
    load_state_dict(task.model, read_weights(folder).tensors, where=folder)
    return task, adapter, folder.name


def _find(config: RunConfig, checkpoint: str, console: Console) -> Path | None:
    """A run's checkpoint folder, None where `checkpoint` is another file."""
    if checkpoint in ("best", "latest"):
        best = best_checkpoint(config.run.folder) if checkpoint == "best" else None
        folder = best or latest_checkpoint(config.run.folder)
        if folder is None:
            raise CheckpointError(
                f"{config.run.folder}: must hold a run's checkpoint; it holds none; train first, or"
                " name one with --checkpoint"
            )
        if checkpoint == "best" and best is None:
            monitor = read_meta(folder)["monitor"]
            text = f"no checkpoint has a finite '{monitor}': the latest stands in for the best"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        return folder
    return Path(checkpoint) if is_checkpoint(Path(checkpoint)) else None
