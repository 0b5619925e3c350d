"""From a run file to a task and its data: what `train`, `evaluate`, `check` and `export` share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fastft.adapters.registry import find_adapter
from fastft.blocks import BlockForwards, compile_task
from fastft.checkpoint import Weights, load_weights, read_weights, start_as
from fastft.config import LossConfig, RunConfig, random_heads
from fastft.data import SourceLoader, check_data, describe_findings, open_evaluation
from fastft.errors import ConfigError
from fastft.finetune import apply_method, staged_names
from fastft.fused import Kernels, choose_kernels, fuse_layer_norms
from fastft.losses import make_criterion, make_penalty
from fastft.names import named_parameters, state_dict
from fastft.optim import Optimizer, group_table, make_groups
from fastft.precision import Precision, make_precision
from fastft.replay import ReplayBuffer
from fastft.step import TrainingStep
from fastft.task import Adapter, FieldSpec, Report, Split, Task


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
    path, heads = config.model.checkpoint, config.finetune.new_heads
    # A strict load fills the whole model, so nothing need be fetched before it.
    fetch = pretrained and (path is None or not config.model.strict)
    task, adapter = _build(config, device, pretrained=fetch)
    random = random_heads(heads)
    if task.pretrained and random:
        fresh, _ = _build(config, torch.device("cpu"), pretrained=False)
        start_as(task.model, fresh.model, random)
    if pretrained and path is not None:
        tensors = adapter.weights(path)
        weights = read_weights(path) if tensors is None else Weights(path, "torch", dict(tensors))
        absent = [*task.added, *task.low_rank]
        report = load_weights(task.model, weights, config.model, heads, absent)
        console.print(report.table(task.notes))
    elif pretrained:
        console.print(
            "no model.checkpoint: the weights are the adapter's, "
            + ("pretrained" if task.pretrained else "random unless it says so")
        )
        for note in task.notes:
            console.print(note)
        if heads:
            # Only they start anew.
            own = Weights(Path("the model's own weights"), "torch", state_dict(task.model))
            load_weights(task.model, own, config.model, heads)
    apply_method(task, config.finetune)
    return task, adapter


def _build(config: RunConfig, device: torch.device, *, pretrained: bool) -> tuple[Task, Adapter]:
    adapter = find_adapter(config.model)
    make_report(adapter, config)
    # What a model is made of may depend on the data, such as a head for each kind of label.
    expect = getattr(adapter, "expect", None)
    if expect is not None:
        expect(config.data, config.finetune.new_heads)
    criterion, checkpoint = make_criterion(config.loss, device), config.model.checkpoint
    task = adapter.build(criterion, device=device, checkpoint=checkpoint, pretrained=pretrained)
    return task, adapter


def build_step(
    config: RunConfig, task: Task, device: torch.device, console: Console
) -> tuple[TrainingStep, BlockForwards]:
    """The training step over a task whose weights are loaded, and how its blocks run.

    Shows the parameter groups and what the step is made of.
    """
    fused_norms = fuse_layer_norms(task, config, device)
    precision = make_precision(config.step.precision, device, tf32=config.step.tf32)
    forwards = compile_task(task, config.step.compile, precision)
    groups = make_groups(task, config.optim, staged_names(task.model, config.finetune))
    trained = [p for group in groups for p in group.parameters.values()]
    kernels = choose_kernels(config, trained, device)
    console.print(group_table(groups, task), _summary(config, precision, kernels))
    for note in (fused_norms, *kernels.notes):
        if note:
            console.print(note)
    optimizer = Optimizer(groups, config.optim, config.run.steps, kernels, config.run.seed)
    penalty = make_penalty(config.loss, task.model, optimizer.parameters)
    replay = make_replay(config, task, device)
    step = TrainingStep(task, optimizer, penalty, config.gradients, precision, kernels, replay)
    return step, forwards


def make_report(adapter: Adapter, config: RunConfig) -> Report | None:
    """The adapter's report for `fastft evaluate`; None where it has none.

    Raises:
        ConfigError: `[evaluate.options]` that it does not take.
    """
    make = getattr(adapter, "report", None)
    if make is not None:
        return make(config.evaluate.options, config.data.train)
    if config.evaluate.options:
        raise ConfigError(
            f"evaluate.options: must be absent, since the adapter '{config.model.adapter}' has no"
            f" report; got {', '.join(config.evaluate.options)}; remove them"
        )
    return None


def make_replay(config: RunConfig, task: Task, device: torch.device) -> ReplayBuffer | None:
    """The replay buffer that `data.replay` asks for.

    Raises:
        ConfigError: the task does not say how predictions become data, or samples would be carried
            on beyond the steps that what is trained is for.
    """
    if config.data.replay is None:
        return None
    if task.carry is None:
        raise ConfigError(
            f"data.replay: must be left out, since predictions of adapter '{config.model.adapter}'"
            " do not become data; got some; remove it"
        )
    most, longest = getattr(task.carry, "longest", None), config.data.replay.longest
    trained = {name for name, p in named_parameters(task.model) if p.requires_grad}
    if most is not None and longest > most and trained <= set(task.low_rank):
        raise ConfigError(
            f"data.replay.longest: must be at most {most}, the steps that the model's own low-rank"
            f" updates are for, since nothing else is trained; got {longest}; lower it"
        )
    return ReplayBuffer(task.carry, device, saved=config.data.replay.save)


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


def _summary(config: RunConfig, precision: Precision, kernels: Kernels) -> str:
    """One line on what is not in the table of groups."""
    schedule, optim = config.optim.schedule, config.optim
    whose = "fastft's" if kernels.adam else "torch's"
    return (
        f"{config.finetune.method} fine-tuning; {whose} {optim.name}, {schedule.name} over"
        f" {config.run.steps} steps with {schedule.warmup_steps} of warm-up;"
        f" {precision.name} on {precision.device}, compile {config.step.compile}"
    )
