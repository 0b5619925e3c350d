"""`fastft train`: the assembly, the one function that knows everybody.

It is longer than other functions may be: the order of its calls is what it has to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fastft.assemble import assemble, build_step, check_run_data, open_split
from fastft.checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint
from fastft.compiling import recompile_limit_explained
from fastft.config import RunConfig
from fastft.data import open_loader
from fastft.finetune import set_train_mode, staged_names, unfreeze
from fastft.graphs import capture_step
from fastft.loop import (
    EvaluateHook,
    LogHook,
    Progress,
    SaveHook,
    TrainingState,
    UnfreezeHook,
    check_evaluation,
    check_monitor,
    find_resumed,
    run_loop,
    try_evaluation,
)
from fastft.memory import fit_batch, fitted_before, out_of_memory_explained, plan_memory
from fastft.metrics import make_metrics, open_writer
from fastft.names import load_state_dict
from fastft.profiling import open_profile
from fastft.runfile import format_run_file
from fastft.runtime import open_run, write_record
from fastft.step import Ema


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
    total, config = config.run.steps, fitted_before(config)
    with recompile_limit_explained(), open_run(config.run, write=not dry_run) as run:
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
        step, forwards = build_step(config, task, run.device, console)
        optimizer, precision = step.optimizer, step.precision
        staged = staged_names(task.model, config.finetune)
        metrics = {**task.metrics, **make_metrics(config.evaluate.metrics, run.device)}
        check_evaluation(config)
        if validation is not None:
            check_monitor(config, try_evaluation(task, validation, metrics, precision))
        if dry_run:
            return None
        ema = Ema(optimizer.parameters, config.ema.decay) if config.ema else None
        config, loader = fit_batch(config, step, forwards, adapter, loader, staged, console)
        plan_memory(
            config, step, forwards, loader.example, staged, console, resumed=saved is not None
        )
        capture_step(config, step, forwards, loader, staged, console)
        sizes = {source.name: len(source) for source in loader.sources}
        state = TrainingState(task, step, ema, run.device, sizes)
        first = state.restore(saved) if saved else 0
        write_record(run.folder, config, run.device)
        unfreeze(task.model, staged, first)
        set_train_mode(task.model, config.finetune.method)
        with (
            out_of_memory_explained(),
            loader,
            open_writer(run.folder, tensorboard=config.log.tensorboard, first_step=first) as writer,
            Progress(console, first, total) as progress,
            open_profile(config, run, step, writer, progress.message) as profile,
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
                loader.batches(first * config.accumulate),
                range(first, total),
                accumulate=config.accumulate,
                ema=ema,
                hooks=[log, *([evaluation] if evaluation else []), saving, unfreezing, profile],
                around=profile.around,
                saving=saving,
                progress=progress,
                run=run,
            )
        return _result(run.folder, evaluation.values if evaluation else {})


def _result(folder: Path, metrics: Mapping[str, float]) -> TrainResult:
    return TrainResult(latest_checkpoint(folder), best_checkpoint(folder), metrics)
