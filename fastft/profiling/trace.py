"""A Chrome trace, as torch's profiler writes it, as typed events.

Times are microseconds since the first event: on torch's clock they are so large that a float has no
room for fractions of a nanosecond. What belongs together is found by two numbers: a call of the
CUDA runtime and the GPU work that it launches share `correlation`, and both hold the `External id`
of the innermost operator that was running.
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The ranges that `fastft.step` and `fastft.loop` mark begin so.
MARK = "fastft/"
STEP = "step"

_GPU_KINDS = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
_CALL_CATEGORIES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True, slots=True)
class Mark:
    """A range that fastft marked on the host; its name is without the prefix."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Operator:
    """A torch operator on the host.

    Attributes:
        external_id: what the GPU work launched from it refers to; -1: unknown.
        dims: shape of each argument, empty for what is no tensor.
        strides: of each argument, in elements; likewise.
        types: C++ name of each argument's type, as 'float' or 'c10::BFloat16'.
        values: arguments that are no tensors, as text.
        parent: index of the operator that called it, -1: none.
        bytes: that it moves, where its caller told the profiler; None: not known.
        flops: that it computes, likewise.
    """

    name: str
    thread: Any
    start: float
    end: float
    external_id: int
    dims: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    values: tuple[str, ...]
    parent: int = -1
    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the CUDA runtime or driver on the host."""

    name: str
    start: float
    end: float
    correlation: int
    external_id: int


@dataclass(frozen=True, slots=True)
class GpuWork:
    """A kernel, a copy or a fill on the GPU.

    Attributes:
        kind: 'kernel', 'memcpy' or 'memset'.
        launched: when the host launched it; None: the trace does not say.
        bytes: moved by a copy; None: not known.
    """

    name: str
    kind: str
    start: float
    end: float
    correlation: int
    external_id: int
    launched: float | None
    bytes: float | None


@dataclass(frozen=True)
class Trace:
    """Everything of a trace that the report needs; each list sorted by start."""

    marks: tuple[Mark, ...]
    operators: tuple[Operator, ...]
    calls: tuple[Call, ...]
    gpu: tuple[GpuWork, ...]


def read_trace(path: Path) -> Trace:
    """Reads a trace file, gzipped or not."""
    written = path.read_bytes()
    text = gzip.decompress(written) if path.suffix == ".gz" else written
    return parse_trace(json.loads(text)["traceEvents"])


def parse_trace(events: Iterable[Mapping[str, Any]]) -> Trace:
    """Sorts the complete events (`"ph": "X"`) of a Chrome trace by what they are."""
    marks, operators, calls, works = [], [], [], []
    complete = [event for event in events if event.get("ph") == "X"]
    began = min((float(event["ts"]) for event in complete), default=0.0)
    for event in complete:
        event = {**event, "ts": float(event["ts"]) - began}
        category, name = event.get("cat"), event["name"]
        if category == "user_annotation" and name.startswith(MARK):
            marks.append(Mark(name.removeprefix(MARK), *_times(event)))
        elif category == "cpu_op":
            operators.append(event)
        elif category in _CALL_CATEGORIES:
            calls.append(Call(name, *_times(event), *_ids(event)))
        elif category in _GPU_KINDS:
            works.append(event)
    calls.sort(key=lambda call: call.start)
    launched = {call.correlation: call.start for call in calls}
    gpu = [_gpu_work(event, launched) for event in works]
    return Trace(
        marks=tuple(sorted(marks, key=lambda mark: mark.start)),
        operators=tuple(_nested(operators)),
        calls=tuple(calls),
        gpu=tuple(sorted(gpu, key=lambda work: (work.start, work.end))),
    )


def _times(event: Mapping[str, Any]) -> tuple[float, float]:
    start = float(event["ts"])
    return start, start + float(event.get("dur", 0))


def _ids(event: Mapping[str, Any]) -> tuple[int, int]:
    arguments = event.get("args", {})
    return int(arguments.get("correlation", -1)), int(arguments.get("External id", -1))


def _gpu_work(event: Mapping[str, Any], launched: Mapping[int, float]) -> GpuWork:
    correlation, external_id = _ids(event)
    moved = event.get("args", {}).get("bytes")
    return GpuWork(
        event["name"],
        _GPU_KINDS[event["cat"]],
        *_times(event),
        correlation,
        external_id,
        launched.get(correlation),
        None if moved is None else float(moved),
    )


def _nested(events: list[Mapping[str, Any]]) -> list[Operator]:
    """Operators with their parents: on one thread an operator lies within its caller."""
    # The longer first, where two begin together: it is the caller.
    events.sort(key=lambda event: (float(event["ts"]), -float(event.get("dur", 0))))
    found: list[Operator] = []
    open_on: dict[Any, list[int]] = {}
    for event in events:
        start, end = _times(event)
        thread = (event.get("pid"), event.get("tid"))
        stack = open_on.setdefault(thread, [])
        while stack and found[stack[-1]].end <= start:
            stack.pop()
        arguments = event.get("args", {})
        operator = Operator(
            event["name"],
            thread,
            start,
            end,
            _ids(event)[1],
            tuple(_shape(dims) for dims in arguments.get("Input Dims", ())),
            tuple(_shape(strides) for strides in arguments.get("Input Strides", ())),
            tuple(arguments.get("Input type", ())),
            tuple(map(str, arguments.get("Concrete Inputs", ()))),
            stack[-1] if stack else -1,
            arguments.get("bytes"),
            arguments.get("flops"),
        )
        stack.append(len(found))
        found.append(operator)
    return found


def _shape(dims: Any) -> tuple[int, ...]:
    """Shape or strides of one argument; of a list of tensors, where they are nested, none."""
    return tuple(dims) if all(isinstance(size, int) for size in dims) else ()
