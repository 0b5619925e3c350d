"""`fastft train`: the assembly, the one function that knows everybody.

It is longer than other functions may be: the order of its calls is what it has to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fastft.assemble import assemble, check_run_data, open_split
from fastft.checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint
from fastft.config import RunConfig
from fastft.data import open_loader
from fastft.finetune import set_train_mode, staged_names, unfreeze
from fastft.fused import Kernels, choose_kernels, fuse_layer_norms
from fastft.loop import (
    EvaluateHook,
    LogHook,
    Progress,
    SaveHook,
    TrainingState,
    UnfreezeHook,
    check_evaluation,
    find_resumed,
    rehearse,
    run_loop,
)
from fastft.losses import make_penalty
from fastft.metrics import make_metrics, open_writer
from fastft.names import load_state_dict
from fastft.optim import Optimizer, group_table, make_groups
from fastft.runfile import format_run_file
from fastft.runtime import open_run, write_record
from fastft.step import Ema, Precision, TrainingStep, compile_task, make_precision


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
    total = config.run.steps
    with open_run(config.run, write=not dry_run) as run:
        resumed = None if dry_run else find_resumed(config)
        saved = load_checkpoint(resumed) if resumed else None
        if saved is not None and saved.meta["step"] >= total:
            console.print(f"nothing to do: step {saved.meta['step']} of {total} is done")
            return _result(run.folder, saved.meta["metrics"])
        task, adapter = assemble(config, run.device, console, pretrained=saved is None)
        loader = open_loader(adapter, config.data, seed=run.seed, device=run.device)
        validation = open_split(adapter, config, "validation", run.device)
        check_run_data(task, adapter, config, [loader, validation], console)
        if saved is not None:
            # Before `prepare`, which may run the model over the data.
            load_state_dict(task.model, saved.model, where=resumed)
        adapter.prepare(task, loader)
        fused_norms = fuse_layer_norms(task, config, run.device)
        precision = make_precision(config.step.precision, run.device)
        compile_task(task, config.step.compile, precision)
        staged = staged_names(task.model, config.finetune)
        groups = make_groups(task, config.optim, staged)
        trained = [p for group in groups for p in group.parameters.values()]
        kernels = choose_kernels(config, trained, run.device)
        console.print(group_table(groups, task), _summary(config, precision, kernels))
        for note in (fused_norms, *kernels.notes):
            if note:
                console.print(note)
        optimizer = Optimizer(groups, config.optim, total, kernels, run.seed)
        penalty = make_penalty(config.loss, task.model, optimizer.parameters)
        step = TrainingStep(task, optimizer, penalty, config.gradients, precision, kernels)
        metrics = {**task.metrics, **make_metrics(config.evaluate.metrics, run.device)}
        check_evaluation(config, metrics)
        if validation is not None:
            rehearse(task, validation, metrics, precision)
        if dry_run:
            return None
        ema = Ema(optimizer.parameters, config.ema.decay) if config.ema else None
        sizes = {source.name: len(source) for source in loader.sources}
        state = TrainingState(task, step, ema, run.device, sizes)
        first = state.restore(saved) if saved else 0
        write_record(run.folder, config, run.device)
        unfreeze(task.model, staged, first)
        set_train_mode(task.model, config.finetune.method)
        with (
            loader,
            open_writer(run.folder, tensorboard=config.log.tensorboard, first_step=first) as writer,
            Progress(console, first, total) as progress,
        ):
            writer.text("run file", f"```toml\n{format_run_file(config)}\n```")
            evaluation = None
            if validation is not None:
                evaluation = EvaluateHook(state, validation, metrics, writer, progress, config)
            saving = SaveHook(state, config, evaluation, progress)
            log = LogHook(step, writer, progress, config, loader.samples)
            unfreezing = UnfreezeHook(task.model, staged, config.finetune.method, progress)
            run_loop(
                step,
                loader.batches(first * config.step.accumulate),
                range(first, total),
                accumulate=config.step.accumulate,
                ema=ema,
                hooks=[log, *([evaluation] if evaluation else []), saving, unfreezing],
                saving=saving,
                progress=progress,
                run=run,
            )
        return _result(run.folder, evaluation.values if evaluation else {})


def _result(folder: Path, metrics: Mapping[str, float]) -> TrainResult:
    return TrainResult(latest_checkpoint(folder), best_checkpoint(folder), metrics)


def _summary(config: RunConfig, precision: Precision, kernels: Kernels) -> str:
    """One line on what is not in the table of groups."""
    schedule, optim = config.optim.schedule, config.optim
    whose = "fastft's" if kernels.adam else "torch's"
    return (
        f"{config.finetune.method} fine-tuning; {whose} {optim.name}, {schedule.name} over"
        f" {config.run.steps} steps with {schedule.warmup_steps} of warm-up;"
        f" {precision.name} on {precision.device}, compile {config.step.compile}"
    )
