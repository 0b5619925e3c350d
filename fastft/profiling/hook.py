"""The profiler around some steps of a run, and the files that it leaves."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.profiler import ProfilerActivity

from fastft.atomic import write_file_atomically
from fastft.config import ProfileConfig, RunConfig
from fastft.metrics import MetricWriter
from fastft.optim import Optimizer
from fastft.precision import Precision
from fastft.profiling.advice import advise
from fastft.profiling.chart import draw_chart, summarise
from fastft.profiling.compiled import compile_facts, graph_count
from fastft.profiling.measure import measure
from fastft.profiling.memory import kept_bytes, memory_report
from fastft.profiling.page import render_page
from fastft.profiling.report import MemoryReport, ProfileReport, RunFacts
from fastft.profiling.stopwatch import Stopwatch, synchronize
from fastft.profiling.trace import read_trace
from fastft.runtime import Run
from fastft.task import Task

FOLDER = "profile"
# TensorBoard's profiler plugin finds files with this ending below its --logdir.
TRACE_FILE = "fastft.pt.trace.json.gz"
MEMORY_FILE = "memory.pickle"

# Several steps of the largest models; each takes some KB.
_ALLOCATIONS = 200_000


class Profiled(Protocol):
    """What the profile must know of the training step."""

    task: Task
    optimizer: Optimizer
    precision: Precision


class NoProfile:
    """In the place of a `ProfileHook` without `[profile]`: nothing."""

    def around(self, index: int) -> AbstractContextManager[None]:
        """Encloses step `index` in nothing."""
        return contextlib.nullcontext()

    def __call__(self, done: int, result: object, samples: int) -> None:
        """Nothing happens."""


@contextlib.contextmanager
def open_profile(
    config: RunConfig,
    run: Run,
    step: Profiled,
    writer: MetricWriter,
    say: Callable[[str], object],
) -> Iterator["ProfileHook | NoProfile"]:
    """The run's profile; a `NoProfile` without `[profile]`.

    Leaving it while steps are being profiled, as a signal makes a run do, writes nothing.

    Args:
        say: shows a line to the user.
    """
    if config.profile is None:
        yield NoProfile()
        return
    hook = ProfileHook(config, config.profile, run, step, writer, say)
    try:
        yield hook
    finally:
        hook.close()


class ProfileHook:
    """Profiles the steps of `[profile]` through `around`, and as a hook writes the report.

    As many steps before are timed without the profiler. The one between warms it up and, on a GPU,
    has its allocations recorded. The host waits for the device before and after each of the three,
    and nowhere in them.
    """

    def __init__(
        self,
        config: RunConfig,
        profile: ProfileConfig,
        run: Run,
        step: Profiled,
        writer: MetricWriter,
        say: Callable[[str], object],
    ) -> None:
        self._config = profile
        self._run, self._step = run, step
        self._facts = _facts(config, profile, run.device, step)
        self._writer, self._say = writer, say
        self._draws = config.log.tensorboard
        self._folder = run.folder / FOLDER
        self._profiler: torch.profiler.profile | None = None
        self._memory: MemoryReport | None = None
        self._snapshot: dict[str, Any] | None = None
        self._stopwatch = Stopwatch(profile, run.device)
        self._graphs = 0
        self._started = self._is_complete = False

    @contextlib.contextmanager
    def around(self, index: int) -> Iterator[None]:
        """Encloses step `index`, counted from 0."""
        config = self._config
        if index >= config.at_step + config.steps:
            yield
            return
        if index < config.at_step - 1:
            with self._stopwatch.around(index):
                yield
            return
        if index == config.at_step - 1:
            self._start(config)
            with self._recorded_memory(config):
                yield
            return
        if self._profiler is None:
            # The run went on in the middle of them.
            yield
            return
        if index == config.at_step:
            synchronize(self._run.device)
            self._graphs = graph_count()
        self._profiler.step()
        yield
        if index == config.at_step + config.steps - 1:
            synchronize(self._run.device)
            self._profiler.stop()
            self._is_complete = True

    def __call__(self, done: int, result: object, samples: int) -> None:
        """Writes the report once the last profiled step is done."""
        if self._is_complete and self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            self._write(profiler)

    def close(self) -> None:
        """Stops a profiler that is still running, and says if the steps never came."""
        if self._profiler is not None and not self._is_complete:
            # What ended the run is the better error.
            with contextlib.suppress(Exception):
                self._profiler.stop()
            self._say("profile: the run ended in the profiled steps; nothing was written")
        self._profiler = None
        if not self._started:
            self._say(
                f"profile: nothing was profiled: step {self._config.at_step - 1}, which comes"
                " before the profiled ones, is not in this part of the run; set profile.at_step"
            )

    def _start(self, config: ProfileConfig) -> None:
        activities = [ProfilerActivity.CPU]
        if self._run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=config.steps, repeat=1),
            record_shapes=True,
            acc_events=True,
        )
        self._profiler.start()
        self._started = True

    @contextlib.contextmanager
    def _recorded_memory(self, config: ProfileConfig) -> Iterator[None]:
        device = self._run.device
        if device.type != "cuda" or not config.memory:
            yield
            return
        synchronize(device)
        # Requested, not rounded up: the events count likewise.
        start = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        record = torch.cuda.memory._record_memory_history
        record("all", stacks="python", max_entries=_ALLOCATIONS, clear_history=True)
        try:
            yield
            synchronize(device)
            self._snapshot = cast(Any, torch.cuda.memory._snapshot(device))
        finally:
            record(None)
        assert self._snapshot is not None
        events = self._snapshot["device_traces"][device.index or 0]
        kept, gradients = kept_bytes(self._step.task.model, self._step.optimizer, device)
        self._memory = memory_report(events, start, kept, gradients)

    def _write(self, profiler: torch.profiler.profile) -> None:
        write_file_atomically(
            self._folder / TRACE_FILE, lambda path: profiler.export_chrome_trace(str(path))
        )
        if self._snapshot is not None:
            snapshot, self._snapshot = self._snapshot, None
            write_file_atomically(
                self._folder / MEMORY_FILE, lambda path: path.write_bytes(pickle.dumps(snapshot))
            )
        trace = read_trace(self._folder / TRACE_FILE)
        compiled = compile_facts(self._graphs)
        unprofiled_ms = self._stopwatch.mean_ms
        report = measure(trace, self._facts, compiled, self._memory, unprofiled_ms)
        report = report.with_advice(advise(report))
        write_report(report, self._folder)
        self._writer.text("profile", summarise(report))
        if self._draws:
            self._writer.image("profile", self._facts.first_step, draw_chart(report))
        self._say(
            f"profile: {report.true_step_ms:.2f} ms per step; report:"
            f" {self._folder / 'report.html'}"
        )


def write_report(report: ProfileReport, folder: Path) -> None:
    """Writes `report.json` and `report.html`.

    Raises:
        CheckpointError: the disk refused.
    """
    for name, text in (("report.json", report.to_json()), ("report.html", render_page(report))):
        write_file_atomically(
            folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8")
        )


def _facts(
    config: RunConfig, profile: ProfileConfig, device: torch.device, step: Profiled
) -> RunFacts:
    is_gpu = device.type == "cuda"
    return RunFacts(
        title=config.run.folder.name,
        device=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        is_gpu=is_gpu,
        precision=step.precision.name,
        compile=config.step.compile,
        layer_norm=config.step.layer_norm,
        blocks=len(step.task.compiled_blocks),
        workers=config.data.workers,
        samples=config.data.micro_batch * config.accumulate,
        accumulate=config.accumulate,
        first_step=profile.at_step,
    )
