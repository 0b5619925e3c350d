"""Whether the captured step is used: it must change nothing, fit, and be faster."""

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from rich.console import Console

from fastft.blocks import BlockForwards
from fastft.config import RunConfig
from fastft.data import SourceLoader
from fastft.graphs.graph import StepGraph
from fastft.graphs.inputs import StaticBatches
from fastft.graphs.record import TOO_LITTLE_MEMORY, NotCaptured, Record, record_on_gpu
from fastft.memory import (
    as_trained_in_the_end,
    enforced_limit,
    out_of_memory_explained,
    try_rehearsal,
)
from fastft.memory.meter import DeviceMeter, Meter
from fastft.step import StepResult, TrainingStep
from fastft.task import Batch

_ROUNDS, _REPEATS = 3, 10
# What sums in no fixed order may change.
_TOLERANCE = 1e-3


def capture_step(
    config: RunConfig,
    step: TrainingStep,
    forwards: BlockForwards,
    loader: SourceLoader,
    staged: Iterable[str],
    console: Console,
) -> None:
    """Gives the step a graph as `step.cuda_graphs` says, and says what was decided.

    The optimizer's state is dropped after it: restore a checkpoint later.

    Args:
        forwards: how the step's blocks run, as planned.
        loader: of the run; the batches of its first two steps are read.
        staged: parameters that are frozen now and trained later.
    """
    device = step.precision.device
    if config.step.cuda_graphs == "off":
        return
    if device.type != "cuda":
        console.print("step.cuda_graphs: only counts on a GPU; this run is on a CPU")
        return
    if list(staged):
        decision = "not used, because finetune.unfreeze changes what is trained"
    elif step.replay is not None:
        decision = "not used, because data.replay puts predictions into the batches"
    elif any(forwards.ways[way].offload for way in forwards.chosen.values()):
        decision = "not used, because the memory plan puts activations on the host"
    else:
        decision = _capture_on_gpu(config, step, loader, console)
    console.print(f"step.cuda_graphs: {decision}", soft_wrap=True)


def _capture_on_gpu(
    config: RunConfig, step: TrainingStep, loader: SourceLoader, console: Console
) -> str:
    device = step.precision.device
    with out_of_memory_explained(), loader:
        batches = loader.batches()
        steps = [[next(batches).to(device) for _ in range(config.accumulate)] for _ in range(2)]

    def fits() -> bool:
        # Anew, because the graph takes memory outside of torch's allocator, too.
        return try_rehearsal(step, steps[0], enforced_limit(config.memory, device)) is not None

    with as_trained_in_the_end(config, step, ()):
        try:
            step.graph, decision = choose_graph(
                step,
                steps,
                config.run.steps,
                record=record_on_gpu,
                fits=fits,
                meter=DeviceMeter(device),
                say=console.print,
            )
        except torch.OutOfMemoryError:
            decision = f"not used, because {TOO_LITTLE_MEMORY}"
    gc.collect()
    torch.cuda.empty_cache()
    enforced_limit(config.memory, device)
    return decision


def choose_graph(
    step: TrainingStep,
    steps: Sequence[Sequence[Batch]],
    total: int,
    *,
    record: Record,
    fits: Callable[[], bool],
    meter: Meter,
    say: Callable[[str], object],
) -> tuple[StepGraph | None, str]:
    """A graph that changes nothing, fits and is faster, or None; and what to tell the user.

    Args:
        steps: the batches of two steps.
        total: steps of the run, over which the learning rate changes.
        fits: whether an uncaptured step fits beside the graph.
        say: told of batches that the graph does not take.
    """
    inputs = StaticBatches(steps[0])
    if not inputs.is_dense:
        return None, "not used, because batches hold sparse or nested tensors"
    if not inputs.match(steps[1]):
        return None, "not used, because batches differ in shapes or host values"
    try:
        graph = StepGraph(step, inputs, record, say)
    except NotCaptured as reason:
        return None, f"not used, because {reason}"
    if not fits():
        return None, f"not used, because {TOO_LITTLE_MEMORY}"
    plain, replayed = (_outcomes(step, steps, total, used) for used in (None, graph))
    changed = first_difference(plain, replayed)
    if changed is not None:
        return None, f"not used, because it changes {changed}"
    uncaptured, captured = _seconds(step, steps[0], graph, meter)
    times = f"a step takes {1e3 * captured:.2f} ms captured, {1e3 * uncaptured:.2f} ms uncaptured"
    if captured >= uncaptured:
        return None, f"not used, because {times}"
    return graph, f"used; {times}"


@contextlib.contextmanager
def _using(step: TrainingStep, graph: StepGraph | None) -> Iterator[None]:
    before, step.graph = step.graph, graph
    try:
        yield
    finally:
        step.graph = before


def _outcomes(
    step: TrainingStep, steps: Sequence[Sequence[Batch]], total: int, graph: StepGraph | None
) -> list[dict[str, float]]:
    """Steps in a row from the same weights and random numbers, at three learning rates."""
    turns = ((0, steps[0]), (total // 2, steps[1]), (total - 1, steps[0]))
    with step.rehearsal(), _using(step, graph):
        return [_values(step(index, batches), step.guard.names) for index, batches in turns]


def _values(result: StepResult, names: Sequence[str]) -> dict[str, float]:
    norms = result.verdict.tensor_norms.tolist()
    return {
        "the loss": result.loss.item(),
        **{f"the loss's part '{name}'": part.item() for name, part in result.parts.items()},
        _NORM: result.verdict.norm.item(),
        **{f"{_OF_ONE} '{name}'": norm for name, norm in zip(names, norms, strict=True)},
    }


_NORM, _OF_ONE = "the gradients' norm", "the gradient of"


def first_difference(
    plain: Sequence[Mapping[str, float]], replayed: Sequence[Mapping[str, float]]
) -> str | None:
    """The first value that differs by more than rounding.

    A single gradient may be nothing but rounding: it is compared by the norm of all of them.
    """
    for ours, theirs in zip(plain, replayed, strict=True):
        norm = ours[_NORM] if math.isfinite(ours[_NORM]) else 0.0
        for name in {**ours, **theirs}:
            if name not in ours or name not in theirs:
                return name
            a, b = ours[name], theirs[name]
            scale = norm if name.startswith(_OF_ONE) else 0.0
            close = math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE * scale)
            if not close and not (math.isnan(a) and math.isnan(b)):
                return name
    return None


def _seconds(
    step: TrainingStep, batches: Sequence[Batch], graph: StepGraph, meter: Meter
) -> tuple[float, float]:
    """Times of whole steps, uncaptured and captured; in turns, because clocks change."""
    times: dict[bool, list[float]] = {False: [], True: []}
    with step.rehearsal():
        for _ in range(_ROUNDS):
            for captured, found in times.items():
                with _using(step, graph if captured else None):
                    found.append(meter.seconds(lambda: step(0, batches), _REPEATS))
    return statistics.median(times[False]), statistics.median(times[True])
