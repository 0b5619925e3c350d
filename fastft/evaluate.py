"""`fastft evaluate` and `fastft export`: a trained model's scores, and its checkpoint."""

import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastft.assemble import assemble, make_report, open_split
from fastft.atomic import write_file_atomically, written_whole
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
from fastft.metrics import make_metrics, write_events
from fastft.names import load_state_dict
from fastft.precision import make_precision
from fastft.runtime import open_run, seed_everything
from fastft.task import Adapter, Split, Task, TextTable


def evaluate(
    config: RunConfig, console: Console, *, checkpoint: str = "best", split: Split = "validation"
) -> dict[str, float]:
    """Scores a checkpoint on the validation or test data.

    Into the run folder go `evaluation-<split>.json`, the same numbers for TensorBoard, and, where
    the adapter has a report, its files in `evaluation-<split>/`.

    Args:
        checkpoint: 'best', 'latest', a checkpoint folder of a run, or any file with weights.

    Raises:
        FastftError: no such data or checkpoint.
    """
    config = fitted_before(config)
    with open_run(config.run, write=False) as run:
        device = run.device
        task, adapter, name, step = _open_trained(config, checkpoint, device, console)
        loader = open_split(adapter, config, split, device)
        if loader is None:
            raise ConfigError(
                f"data.{split}: must name a data set to evaluate on; got none; add [[data.{split}]]"
            )
        fuse_layer_norms(task, config, device)
        precision = make_precision(config.step.precision, device, tf32=config.step.tf32)
        compile_task(task, config.step.compile, precision)
        report = make_report(adapter, config)
        own = task.metrics if report is None else {"report": report}
        metrics = {**own, **make_metrics(config.evaluate.metrics, device)}
        with loader:
            values = score(task, loader, metrics, precision)
        # A report has a table of its own.
        detailed = report.compute() if report else {}
    brief = [(metric, f"{value:.5g}") for metric, value in values.items() if metric not in detailed]
    title = f"{name} on {split} data ({loader.samples:,} samples)"
    for table in (
        TextTable(title, ["metric", "value"], brief),
        *([report.table()] if report else []),
    ):
        console.print(_rich_table(table, console.width))
    if config.run.folder.is_dir():
        record = {"checkpoint": name, "split": split, "samples": loader.samples, "values": values}
        text = json.dumps(record, indent=2) + "\n"
        folder = config.run.folder / f"evaluation-{split}"
        write_file_atomically(folder.with_suffix(".json"), lambda path: path.write_text(text))
        if config.log.tensorboard and step is not None:
            scores = {f"{split}/{metric}": value for metric, value in values.items()}
            write_events(config.run.folder / "tensorboard" / folder.name, step, scores)
        if report is not None:
            with written_whole(folder) as temporary:
                temporary.mkdir()
                report.write(temporary)
            console.print(f"written: {folder}", markup=False, highlight=False, soft_wrap=True)
    return values


def _rich_table(shown: TextTable, width: int) -> Table:
    # A title must not be folded to the width of a narrow table.
    table = Table(title=Text(shown.title), min_width=min(len(shown.title), width))
    for number, column in enumerate(shown.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in shown.rows:
        # As text: names may have brackets, which rich takes for markup.
        table.add_row(*map(Text, row))
    return table


def export(config: RunConfig, console: Console, target: Path, *, checkpoint: str = "best") -> None:
    """Writes a checkpoint in the format of the model family's own tools; low-rank updates merged.

    Raises:
        FastftError: no such checkpoint, or `target` cannot be written.
    """
    seed_everything(config.run.seed)
    task, adapter, name, _ = _open_trained(config, checkpoint, torch.device("cpu"), console)
    merge_lora(task.model)
    write_file_atomically(target, lambda path: adapter.save(task, path))
    console.print(f"{name} -> {target}", markup=False, highlight=False, soft_wrap=True)


def _open_trained(
    config: RunConfig, checkpoint: str, device: torch.device, console: Console
) -> tuple[Task, Adapter, str, int | None]:
    """The task with a checkpoint's weights (averaged ones where it has them), its name and step.

    No step where the checkpoint is not of this run.
    """
    folder = _find(config, checkpoint, console)
    if folder is None:
        # Someone else's file: the whole model must come from it, with nothing new and no adapters.
        model = dataclasses.replace(config.model, checkpoint=Path(checkpoint), strict=True)
        foreign = dataclasses.replace(config, model=model, finetune=FinetuneConfig())
        task, adapter = assemble(foreign, device, console)
        if task.new_heads:
            raise CheckpointError(
                f"{checkpoint}: must hold the whole model; it lacks {', '.join(task.new_heads)};"
                " name a trained checkpoint"
            )
        return task, adapter, checkpoint, None
    task, adapter = assemble(config, device, console, pretrained=False)
    load_state_dict(task.model, read_weights(folder).tensors, where=folder)
    own = folder.resolve().is_relative_to(config.run.folder.resolve())
    return task, adapter, folder.name, read_meta(folder)["step"] if own else None


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
