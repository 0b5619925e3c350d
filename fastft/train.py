"""`fastft train`: the assembly, the one function that knows everybody."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fastft.assemble import assemble, check_run_data, open_split
from fastft.checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint
from fastft.config import RunConfig
from fastft.data import open_loader
from fastft.finetune import set_train_mode, staged_names, unfreeze
from fastft.loop import (
    EvaluateHook,
    LogHook,
    Progress,
    SaveHook,
    TrainingState,
    UnfreezeHook,
    check_monitor,
    find_resumed,
    run_loop,
)
from fastft.losses import make_penalty
from fastft.metrics import MetricWriter, make_metrics, open_writer
from fastft.names import load_state_dict
from fastft.optim import Optimizer, group_table, make_groups
from fastft.runfile import format_run_file
from fastft.runtime import open_run, write_record
from fastft.step import Ema, TrainingStep, compile_task, make_precision
from fastft.task import Loader, Metric


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        checkpoint: of the last step.
        best: the best by `checkpoint.monitor`; None where nothing was evaluated.
        metrics: of the last evaluation.
    """

    checkpoint: Path | None
    best: Path | None
    metrics: Mapping[str, float]


def train(config: RunConfig, console: Console, *, dry_run: bool = False) -> TrainResult | None:
    """Fine-tunes as the run file says, or goes on with the run that its folder holds.

    Args:
        console: where tables and progress are shown.
        dry_run: stop after showing what would be trained; writes nothing and returns None.

    Raises:
        FastftError: anything that the user can mend.
    """
    with open_run(config.run, write=not dry_run) as run:
        resumed = None if dry_run else find_resumed(config)
        assembled = assemble(config, run.device, console, pretrained=resumed is None)
        task, adapter = assembled.task, assembled.adapter
        loader = open_loader(adapter, config.data, seed=run.seed, device=run.device)
        validation = open_split(adapter, config, "validation", run.device)
        check_run_data(assembled, config, [loader, validation], console)
        saved = load_checkpoint(resumed) if resumed else None
        if saved is not None:
            # Before `prepare`, which may run the model over the data.
            load_state_dict(task.model, saved.model, where=resumed)
        adapter.prepare(task, loader)
        precision = make_precision(config.step.precision, run.device)
        compile_task(task, config.step.compile, precision)
        staged = staged_names(task.model, config.finetune)
        groups = make_groups(task, config.optim, staged)
        console.print(group_table(groups, task))
        optimizer = Optimizer(groups, config.optim, config.run.steps)
        penalty = make_penalty(config.loss, task.model)
        step = TrainingStep(task, optimizer, penalty, config.gradients, precision)
        metrics = {**task.metrics, **make_metrics(config.evaluate.metrics, run.device)}
        check_monitor(config, metrics)
        if dry_run:
            return None
        ema = Ema(task.model, config.ema.decay) if config.ema else None
        state = TrainingState(task, optimizer, step, ema, run.device)
        first = state.restore(saved) if saved else 0
        write_record(run.folder, config, run.device)
        unfreeze(task.model, staged, first)
        set_train_mode(task.model)
        with (
            loader,
            open_writer(run.folder, tensorboard=config.log.tensorboard, first_step=first) as writer,
            Progress(console, first, config.run.steps) as progress,
        ):
            if first == 0:
                writer.text("run file", f"```toml\n{format_run_file(config)}\n```")
            evaluation = _evaluation(config, state, validation, metrics, writer, progress)
            saving = SaveHook(state, config, evaluation)
            log = LogHook(step, optimizer, writer, progress, config, loader.samples)
            unfreezing = UnfreezeHook(task.model, staged, progress)
            run_loop(
                step,
                loader.batches(first * config.step.accumulate),
                range(first, config.run.steps),
                accumulate=config.step.accumulate,
                ema=ema,
                hooks=[log, *([evaluation] if evaluation else []), saving, unfreezing],
                saving=saving,
                progress=progress,
                run=run,
            )
        return TrainResult(
            latest_checkpoint(run.folder),
            best_checkpoint(run.folder),
            evaluation.values if evaluation else {},
        )


def _evaluation(
    config: RunConfig,
    state: TrainingState,
    validation: Loader | None,
    metrics: Mapping[str, Metric],
    writer: MetricWriter,
    progress: Progress,
) -> EvaluateHook | None:
    if validation is None:
        return None
    return EvaluateHook(
        state,
        validation,
        metrics,
        writer,
        progress,
        every=config.evaluate.every_steps,
        total=config.run.steps,
    )
