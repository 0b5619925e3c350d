"""From a run file to a task and its data: what `train`, `evaluate`, `check` and `export` share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from fastft.adapters.registry import find_adapter
from fastft.checkpoint import LoadReport, Weights, load_weights, read_weights
from fastft.config import RunConfig
from fastft.data import SourceLoader, check_data, describe_findings, open_evaluation
from fastft.errors import ConfigError
from fastft.finetune import apply_method
from fastft.losses import make_criterion
from fastft.task import Adapter, FieldSpec, Split, Task


@dataclass(frozen=True)
class Assembled:
    """A task with its adapter."""

    adapter: Adapter
    task: Task


def assemble(
    config: RunConfig, device: torch.device, console: Console, *, pretrained: bool = True
) -> Assembled:
    """Builds the model, loads the pretrained checkpoint, freezes and wraps as `[finetune]` says.

    Args:
        config: the run.
        device: where the model goes.
        console: where the report of what was loaded goes.
        pretrained: False where a run's own checkpoint is loaded over everything anyway.
    """
    adapter = find_adapter(config.model)
    criterion = make_criterion(config.loss, device)
    path = config.model.checkpoint
    task = adapter.build(criterion, device=device, checkpoint=path)
    heads = config.finetune.new_heads
    if path is None and any(head.init != "random" for head in heads.values()):
        raise ConfigError(
            "finetune.new_heads: without model.checkpoint every head is new and 'random'; got"
            " another init; set model.checkpoint"
        )
    if path is not None and pretrained:
        console.print(_load(adapter, task, config).table())
    apply_method(task, config.finetune)
    return Assembled(adapter, task)


def _load(adapter: Adapter, task: Task, config: RunConfig) -> LoadReport:
    path = config.model.checkpoint
    assert path is not None
    tensors = adapter.weights(path)
    weights = read_weights(path) if tensors is None else Weights(path, "torch", dict(tensors))
    return load_weights(task.model, weights, config.model, config.finetune.new_heads)


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
    assembled: Assembled,
    config: RunConfig,
    loaders: Sequence[SourceLoader | None],
    console: Console,
) -> None:
    """Runs the core's and the adapter's data checks and shows what they found.

    Raises:
        DataError: listing every finding that is an error.
    """
    sources = [source for loader in loaders if loader for source in loader.sources]
    targets = {term.target: FieldSpec() for term in config.loss.terms}
    fields = {**targets, **assembled.task.fields}
    findings = check_data(sources, assembled.adapter.checks, fields, config.data.checks)
    if findings:
        console.print(describe_findings(findings))
