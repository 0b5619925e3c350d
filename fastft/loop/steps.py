"""The loop over optimizer steps."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch.profiler import record_function

from fastft.errors import TrainingInterrupted, TrainingStopped
from fastft.loop.hooks import SaveHook
from fastft.loop.progress import Progress
from fastft.runtime import Run
from fastft.step import Ema, StepResult, TrainingStep
from fastft.task import Batch


class Hook(Protocol):
    """Runs after every step and decides itself whether it is due."""

    def __call__(self, done: int, result: StepResult, samples: int, /) -> None:
        """Acts on a step.

        Args:
            done: finished steps, 1 after the first.
            result: what the step left on the device.
            samples: samples in the step.
        """
        ...


def run_loop(
    step: TrainingStep,
    batches: Iterator[Batch],
    steps: range,
    *,
    accumulate: int,
    ema: Ema | None,
    hooks: Sequence[Hook],
    around: Callable[[int], AbstractContextManager[None]] = lambda index: contextlib.nullcontext(),
    saving: SaveHook,
    progress: Progress,
    run: Run,
) -> None:
    """Runs `steps`; each takes `accumulate` batches and is followed by the hooks.

    From here on a signal lets the step finish.

    Args:
        around: encloses each step, given its index; hooks run outside of it.
        saving: one of the hooks; also saves where a signal or a failing hook ends the run.

    Raises:
        TrainingInterrupted: a signal came; the step it came in is finished and saved.
    """
    with run.signals as signals:
        for index in steps:
            with around(index), record_function("fastft/step"):
                began = time.perf_counter()
                with record_function("fastft/data"):
                    micro_batches = [next(batches).to(run.device) for _ in range(accumulate)]
                result = step(index, micro_batches)
                if ema is not None:
                    with record_function("fastft/update"):
                        ema.update(index)
                seconds = time.perf_counter() - began
            done = index + 1
            samples = sum(batch.size for batch in micro_batches)
            progress.step_seconds += seconds
            progress.advance(done)
            try:
                for hook in hooks:
                    hook(done, result, samples)
            except TrainingStopped:
                raise
            except Exception:
                # A failing evaluation must not cost the training before it.
                with contextlib.suppress(Exception):
                    saving.save_now(done)
                raise
            if signals.received is not None and done < steps.stop:
                if not saving.save_now(done):
                    raise TrainingStopped(
                        f"{signals.received}: stopped after step {done} of {steps.stop}, whose"
                        " weights are not finite and were not saved; earlier checkpoints are intact"
                    )
                raise TrainingInterrupted(
                    f"{signals.received}: stopped after step {done} of {steps.stop} and saved it;"
                    " the same command with --resume goes on from there"
                )
