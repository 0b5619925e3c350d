"""Whether the captured step is used: it must change nothing, fit, and be faster."""

import contextlib
import functools
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from rich.console import Console

from fastft.blocks import BlockForwards
from fastft.config import RunConfig
from fastft.data import SourceLoader
from fastft.graphs.compare import difference
from fastft.graphs.forms import MOST_WAITING, StepGraphs
from fastft.graphs.inputs import Form, apart, form_of, same_form
from fastft.graphs.record import (
    TOO_LITTLE_MEMORY,
    NotCaptured,
    Record,
    Recorded,
    Run,
    make_record_on_gpu,
)
from fastft.memory import (
    as_trained_in_the_end,
    enforced_limit,
    out_of_memory_explained,
    try_rehearsal,
)
from fastft.memory.meter import DeviceMeter, Meter
from fastft.memory.rehearsal import free_cached
from fastft.step import TrainingStep
from fastft.task import Batch

_ROUNDS, _REPEATS = 3, 10
# Steps whose batches are looked at for two that are alike.
_LOOKED_AT = 16
# Of a step's time: for less, the memory of its activations is not held all the time.
_WORTH = 0.05


def capture_step(
    config: RunConfig,
    step: TrainingStep,
    forwards: BlockForwards,
    loader: SourceLoader,
    staged: Iterable[str],
    console: Console,
) -> None:
    """Gives the step graphs as `step.cuda_graphs` says, and says what was decided.

    The optimizer's state is dropped after it: restore a checkpoint later.

    Args:
        forwards: how the step's blocks run, as planned.
        loader: of the run; its first batches are read, until two steps' are alike.
        staged: parameters that are frozen now and trained later.
    """
    device = step.precision.device
    # Reasons quote code, whose brackets are no markup.
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if config.step.cuda_graphs == "off":
        return
    if device.type != "cuda":
        say("step.cuda_graphs: only counts on a GPU; this run is on a CPU")
        return
    if list(staged):
        decision = "not used, because finetune.unfreeze changes what is trained"
    elif step.replay is not None:
        decision = "not used, because data.replay puts predictions into the batches"
    elif any(forwards.ways[way].offload for way in forwards.chosen.values()):
        decision = "not used, because the memory plan puts activations on the host"
    else:
        decision = _capture_on_gpu(config, step, loader, say)
    say(f"step.cuda_graphs: {decision}")


def _capture_on_gpu(
    config: RunConfig, step: TrainingStep, loader: SourceLoader, say: Callable[[str], object]
) -> str:
    device = step.precision.device
    with out_of_memory_explained(), loader:
        batches = loader.batches()
        looked_at = ([next(batches) for _ in range(config.accumulate)] for _ in range(_LOOKED_AT))
        steps = first_alike(looked_at)
    if steps is None:
        return (
            f"not used, because the batches of {_LOOKED_AT} steps differ in shapes or host values"
        )
    steps = [[batch.to(device) for batch in each] for each in steps]

    def fits() -> bool:
        limit = enforced_limit(config.memory, device)
        return try_rehearsal(step, [apart(batch) for batch in steps[0]], limit) is not None

    capture = make_record_on_gpu(device)

    def record(run: Run, device: torch.device) -> Recorded:
        recorded = capture(run, device)
        # Of other forms, too, which are met in the middle of the run.
        enforced_limit(config.memory, device)
        return recorded

    with as_trained_in_the_end(config, step, ()):
        try:
            step.graph, decision = choose_graph(
                step,
                steps,
                config.run.steps,
                record=record,
                fits=fits,
                meter=DeviceMeter(device),
                say=say,
            )
        except torch.OutOfMemoryError:
            decision = f"not used, because {TOO_LITTLE_MEMORY}"
    free_cached()
    enforced_limit(config.memory, device)
    return decision


def first_alike(steps: Iterable[Sequence[Batch]]) -> list[Sequence[Batch]] | None:
    """The batches of the first two steps that differ in their tensors' values alone."""
    # Those of Aurora may all differ, in their time, and are large.
    seen = deque[tuple[Form, Sequence[Batch]]](maxlen=MOST_WAITING)
    for batches in steps:
        form = form_of(batches)
        for other, earlier in seen:
            if same_form(form, other):
                return [earlier, batches]
        seen.append((form, batches))
    return None


def choose_graph(
    step: TrainingStep,
    steps: Sequence[Sequence[Batch]],
    total: int,
    *,
    record: Record,
    fits: Callable[[], bool],
    meter: Meter,
    say: Callable[[str], object],
) -> tuple[StepGraphs | None, str]:
    """Graphs, the first of which changes nothing, fits and is faster, or None; and what to say.

    Args:
        steps: the batches of two steps that are alike.
        total: steps of the run, over which the learning rate changes.
        fits: whether an uncaptured step fits beside the graph.
        say: told of batches that get no graph.
    """
    graphs = StepGraphs(step, record, total, say)
    try:
        graph = graphs.add(steps[0])
    except NotCaptured as reason:
        return None, f"not used, because {reason}"
    if not fits():
        return None, f"not used, because {TOO_LITTLE_MEMORY}"
    changed = difference(step, steps, total, graph.replay)
    if changed is not None:
        return None, f"not used, because it changes {changed}"
    uncaptured, captured = _seconds(step, steps[0], graphs, meter)
    times = f"a step takes {1e3 * captured:.2f} ms captured, {1e3 * uncaptured:.2f} ms uncaptured"
    if captured > (1 - _WORTH) * uncaptured:
        return None, f"not used, because {times}"
    return graphs, f"used; {times}"


@contextlib.contextmanager
def _using(step: TrainingStep, graph: StepGraphs | None) -> Iterator[None]:
    before, step.graph = step.graph, graph
    try:
        yield
    finally:
        step.graph = before


def _seconds(
    step: TrainingStep, batches: Sequence[Batch], graph: StepGraphs, meter: Meter
) -> tuple[float, float]:
    """Times of whole steps, uncaptured and captured; in turns, because clocks change."""
    times: dict[bool, list[float]] = {False: [], True: []}

    def run() -> None:
        step(0, [apart(batch) for batch in batches])

    with step.rehearsal():
        for _ in range(_ROUNDS):
            for captured, found in times.items():
                with _using(step, graph if captured else None):
                    found.append(meter.seconds(run, _REPEATS))
    return statistics.median(times[False]), statistics.median(times[True])
