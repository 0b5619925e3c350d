"""What happens after a step: logging, evaluation, saving, unfreezing."""

import contextlib
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastft.checkpoint import best_checkpoint, read_meta, save_checkpoint
from fastft.config import RunConfig
from fastft.errors import ConfigError, TrainingStopped, nearest
from fastft.finetune import set_train_mode, unfreeze
from fastft.loop.progress import Progress, peak_memory_gib
from fastft.loop.scoring import score
from fastft.loop.state import TrainingState
from fastft.metrics import MetricWriter
from fastft.profiling.compiled import CompileWatch, evaluation_compiles
from fastft.step import StepResult, TrainingStep
from fastft.task import Loader, Metric


def is_due(done: int, every: int | None, total: int) -> bool:
    """Whether something that happens every N steps, and at the end, is due after `done` steps."""
    return done == total or (every is not None and done % every == 0)


def check_evaluation(config: RunConfig) -> None:
    """Refuses settings of an evaluation that will not be.

    Raises:
        ConfigError: settings without validation data.
    """
    if not config.data.validation:
        idle = {
            "evaluate.metrics": bool(config.evaluate.metrics),
            "evaluate.every_steps": config.evaluate.every_steps is not None,
            "checkpoint.monitor": config.checkpoint.monitor != "loss",
        }
        if any(idle.values()):
            raise ConfigError(
                f"{key}: needs data to evaluate on; data.validation is empty; add it or drop this"
                for key, is_set in idle.items()
                if is_set
            )


def check_monitor(config: RunConfig, reported: Mapping[str, float]) -> None:
    """Refuses a `checkpoint.monitor` that is not among the values of an evaluation.

    Raises:
        ConfigError: it is not.
    """
    monitor = config.checkpoint.monitor
    if monitor not in reported:
        raise ConfigError(
            f"checkpoint.monitor: must be a value that evaluation reports; got '{monitor}'"
            f"{nearest(monitor, reported)}"
        )


class LogHook:
    """Reads the device once per log point, writes and shows what it finds.

    The mean loss is over the steps since the last log point. Raises `TrainingStopped` where the
    gradient guard asked for it.
    """

    def __init__(
        self,
        step: TrainingStep,
        writer: MetricWriter,
        progress: Progress,
        config: RunConfig,
        samples_per_pass: int,
    ) -> None:
        self._step = step
        self._writer, self._progress = writer, progress
        # Before an evaluation or a save too: the steps' work is then waited for here, not there.
        self._periods = [
            config.log.every_steps,
            config.evaluate.every_steps,
            config.checkpoint.every_steps,
        ]
        self._total = config.run.steps
        self._samples_per_pass = samples_per_pass
        self._compile = CompileWatch() if config.step.compile != "off" else None
        self._losses: list[Tensor] = []
        self._samples = 0
        self._first = True
        self._counted_seconds = 0.0
        # Not 0 where the run goes on.
        self._nonfinite = step.guard.counters()["nonfinite"].item()

    def __call__(self, done: int, result: StepResult, samples: int) -> None:
        """Collects; at a log point, reads."""
        self._losses.append(result.loss)
        self._samples += samples
        if any(is_due(done, every, self._total) for every in self._periods):
            self._log(done, result, samples)

    def _log(self, done: int, result: StepResult, samples: int) -> None:
        guard = self._step.guard
        norms = self._step.summary(result.verdict.tensor_norms)
        began = time.perf_counter()
        values = _read(
            {
                **{f"train/{name}": part for name, part in result.parts.items()},
                "train/loss": _finite_mean(torch.stack(self._losses)),
                "gradients/norm": result.verdict.norm,
                **{f"gradients/{name}": norm for name, norm in norms.items()},
                **{f"gradients/{name}": count for name, count in guard.counters().items()},
                "step/loss_scale": guard.scale,
                **{f"updates/{name}": r for name, r in self._step.update_ratios().items()},
            }
        )
        # What the host waited for here is work of the steps as well.
        waited = time.perf_counter() - began
        seconds = self._progress.step_seconds - self._counted_seconds + waited
        self._counted_seconds = self._progress.step_seconds
        values["speed/samples_per_second"] = self._samples / max(seconds, 1e-9)
        values["memory/peak_gib"] = peak_memory_gib(result.loss.device)
        values["train/passes"] = done * samples / self._samples_per_pass
        for name, lr in self._step.optimizer.learning_rates(done - 1).items():
            values[f"lr/{name}"] = lr
        compiled, messages = self._compile.look() if self._compile else ({}, [])
        values.update(compiled)
        self._writer.write(done, values)
        self._progress.report(done, values)
        for message in messages:
            self._progress.message(f"step {done}: {message}")
        self._warn(done, values)
        self._losses, self._samples = [], 0

    def _warn(self, done: int, values: Mapping[str, float]) -> None:
        untouched = self._step.untouched_names() if self._first else []
        self._first = False
        if untouched:
            self._progress.message(
                f"step {done}: {len(untouched)} trained tensors have had no gradient so far, as"
                f" {untouched[0]}; freeze them if the loss does not need them"
            )
        new = values["gradients/nonfinite"] - self._nonfinite
        self._nonfinite = values["gradients/nonfinite"]
        names = self._step.guard.take_bad_names() if new > 0 else []
        where = f", first in {', '.join(names[:3])}" if names else ""
        # fp16 finds its loss scale by overflowing a few times; that is no news.
        if new > 0 and not (self._step.precision.name == "fp16" and new <= 3):
            self._progress.message(
                f"step {done}: non-finite gradients in {new:.0f} steps since the last log{where}"
            )
        if values["gradients/stop"]:
            raise TrainingStopped(
                f"gradients: {values['gradients/bad_in_a_row']:.0f} bad steps in a row"
                f" (gradients.stop_after), at step {done}{where}; no bad update was applied after"
                " the limit and earlier checkpoints are intact; lower optim.lr, set"
                " gradients.clip_norm, or check the data"
            )


def _finite_mean(losses: Tensor) -> Tensor:
    """The mean over the steps with a finite loss, NaN without any."""
    finite = torch.isfinite(losses)
    return torch.where(finite, losses, 0).sum() / finite.sum()


def _read(values: Mapping[str, Tensor]) -> dict[str, float]:
    """All device scalars in one copy: the only wait of a log point."""
    # A user's loss may report parts that it keeps on the host.
    device = values["train/loss"].device
    stacked = torch.stack([value.detach().float().to(device) for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


class EvaluateHook:
    """Evaluates every N steps and at the end.

    Attributes:
        values: of the last evaluation.
        done: the step of the last evaluation.
    """

    def __init__(
        self,
        state: TrainingState,
        loader: Loader,
        metrics: Mapping[str, Metric],
        writer: MetricWriter,
        progress: Progress,
        config: RunConfig,
    ) -> None:
        self._state, self._loader, self._metrics = state, loader, metrics
        self._writer, self._progress = writer, progress
        self._every, self._total = config.evaluate.every_steps, config.run.steps
        self.values: dict[str, float] = {}
        self.done = 0

    def __call__(self, done: int, result: StepResult, samples: int) -> None:
        """Evaluates if due."""
        if not is_due(done, self._every, self._total):
            return
        task, ema = self._state.task, self._state.ema
        with evaluation_compiles(), ema.swapped_in() if ema else contextlib.nullcontext():
            self.values = score(task, self._loader, self._metrics, self._state.step.precision)
        self.done = done
        self._writer.write(done, {f"validation/{k}": v for k, v in self.values.items()})
        shown = "  ".join(f"{k} {v:.4g}" for k, v in self.values.items() if not self._detail(k))
        self._progress.message(f"step {done}: validation  {shown}")

    def _detail(self, name: str) -> bool:
        """Whether a value is one of many of a metric: 'f1/class_0' of 'f1'."""
        return name not in self._metrics and any(name.startswith(f"{m}/") for m in self._metrics)


class SaveHook:
    """Saves every N steps, at the end, and where an evaluation is the best so far."""

    def __init__(
        self,
        state: TrainingState,
        config: RunConfig,
        evaluation: EvaluateHook | None,
        progress: Progress,
    ) -> None:
        self._state, self._evaluation, self._progress = state, evaluation, progress
        self._saved = 0
        self._folder = config.run.folder
        self._config, self._total = config.checkpoint, config.run.steps
        best = best_checkpoint(self._folder)
        # By its metrics rather than its own monitor, which another one may replace on resuming.
        self._best = read_meta(best)["metrics"].get(self._config.monitor) if best else None

    def __call__(self, done: int, result: StepResult, samples: int) -> None:
        """Saves if due."""
        improved = self._improved(done)
        if improved or is_due(done, self._config.every_steps, self._total):
            self.save_now(done)

    def save_now(self, done: int) -> bool:
        """Saves with the values of this step's evaluation, if there was one; once per step.

        Returns:
            Whether the step is saved.

        Raises:
            TrainingStopped: the last step leaves weights that are not finite. Before that, a save
                of such weights is left out, so that it cannot push out a good one.
        """
        if self._saved == done:
            return True
        bad = self._state.nonfinite_names()
        if bad:
            problem = f"step {done}: {len(bad)} tensors are not finite, as {bad[0]}; not saved"
            if done == self._total:
                raise TrainingStopped(f"{problem}; earlier checkpoints are intact")
            self._progress.message(problem)
            return False
        self._saved = done
        evaluation = self._evaluation
        metrics = evaluation.values if evaluation and evaluation.done == done else {}
        save_checkpoint(
            self._folder,
            done,
            self._state.model_state(),
            self._state.training_state(),
            {"metrics": metrics},
            self._state.ema_state(),
            keep_last=self._config.keep_last,
            monitor=self._config.monitor,
            mode=self._config.mode,
        )
        return True

    def _improved(self, done: int) -> bool:
        if self._evaluation is None or self._evaluation.done != done:
            return False
        value = self._evaluation.values.get(self._config.monitor, math.nan)
        sign = 1 if self._config.mode == "min" else -1
        if math.isnan(value) or (self._best is not None and sign * value >= sign * self._best):
            return False
        self._best = value
        return True


class UnfreezeHook:
    """Makes staged parameters trainable when their step comes."""

    def __init__(
        self, model: nn.Module, staged: Mapping[str, int], method: str, progress: Progress
    ) -> None:
        self._model, self._staged, self._method = model, staged, method
        self._progress = progress

    def __call__(self, done: int, result: StepResult, samples: int) -> None:
        """Unfreezes what step `done` (0-based: the next one) trains."""
        names = unfreeze(self._model, self._staged, done)
        if names:
            set_train_mode(self._model, self._method)
            self._progress.message(
                f"step {done}: {len(names)} parameters unfrozen: {names[0]}, ..."
            )
