"""From a run file to a task and its data: what `train`, `evaluate`, `check` and `export` share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fastft.adapters.registry import find_adapter
from fastft.checkpoint import Weights, load_weights, read_weights
from fastft.config import LossConfig, RunConfig
from fastft.data import SourceLoader, check_data, describe_findings, open_evaluation
from fastft.finetune import apply_method
from fastft.losses import make_criterion
from fastft.names import state_dict
from fastft.task import Adapter, FieldSpec, Split, Task


def assemble(
    config: RunConfig, device: torch.device, console: Console, *, pretrained: bool = True
) -> tuple[Task, Adapter]:
    """Builds the model, loads the pretrained checkpoint, freezes and wraps as `[finetune]` says.

    Args:
        config: the run.
        device: where the model goes.
        console: where the report of what was loaded goes.
        pretrained: False where a run's own checkpoint is loaded over everything anyway.
    """
    adapter = find_adapter(config.model)
    path, heads = config.model.checkpoint, config.finetune.new_heads
    task = adapter.build(
        make_criterion(config.loss, device),
        device=device,
        checkpoint=path,
        # A strict load fills the whole model, so nothing need be fetched before it.
        pretrained=pretrained and (path is None or not config.model.strict),
    )
    if pretrained and path is not None:
        tensors = adapter.weights(path)
        weights = read_weights(path) if tensors is None else Weights(path, "torch", dict(tensors))
        console.print(load_weights(task.model, weights, config.model, heads).table())
    elif pretrained:
        console.print(
            "no model.checkpoint: the weights are the adapter's, random unless it says so"
        )
        if heads:
            # Only they start anew.
            own = Weights(Path("the model's own weights"), "torch", state_dict(task.model))
            load_weights(task.model, own, config.model, heads)
    apply_method(task, config.finetune)
    return task, adapter


def open_split(
    adapter: Adapter, config: RunConfig, split: Split, device: torch.device
) -> SourceLoader | None:
    """One ordered pass over the validation or test data, None where the run file has none."""
    sources = config.data.validation if split == "validation" else config.data.test
    if not sources:
        return None
    return open_evaluation(
        adapter, sources, config.data, device=device, split=split, seed=config.run.seed
    )


def check_run_data(
    task: Task,
    adapter: Adapter,
    config: RunConfig,
    loaders: Sequence[SourceLoader | None],
    console: Console,
) -> None:
    """Runs the core's and the adapter's data checks and shows what they found.

    Raises:
        DataError: listing every finding that is an error.
    """
    sources = [source for loader in loaders if loader for source in loader.sources]
    fields = _expected_fields(task, config.loss)
    findings = check_data(sources, adapter.checks, fields, config.data.checks)
    if findings:
        console.print(describe_findings(findings))


def _expected_fields(task: Task, loss: LossConfig) -> dict[str, FieldSpec]:
    """What the model and the loss's terms expect of the data; where both say it, the model."""
    fields = dict(task.fields)
    for term in loss.terms:
        spec = fields.get(term.target, FieldSpec())
        if spec.ignore_index is None:
            ignored = getattr(term, "ignore_index", None)
            spec = dataclasses.replace(spec, ignore_index=ignored)
        fields[term.target] = spec
    return fields
