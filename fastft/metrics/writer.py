"""Numbers of a run on disk: `metrics.jsonl`, one JSON object a line, and TensorBoard events."""

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fastft.atomic import writing_explained, written_whole
from fastft.errors import CheckpointError

_log = logging.getLogger(__name__)


def open_writer(folder: Path, *, tensorboard: bool, first_step: int) -> "MetricWriter":
    """Opens the run folder's logs to go on after `first_step` finished steps; 0 starts them anew.

    What an interrupted run wrote after its last checkpoint is dropped, so that every step is
    logged once: lines of later steps and a line cut short by a kill. TensorBoard is told to ignore
    later events.

    Raises:
        CheckpointError: the disk refused; an earlier log is as before.
    """
    last_step = first_step if first_step else -1
    path = folder / "metrics.jsonl"
    with writing_explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_after(path, last_step)
        events = _EventFile(folder / "tensorboard", last_step + 1) if tensorboard else None
        return MetricWriter(path, events, first_step)


def write_events(folder: Path, step: int, values: Mapping[str, float]) -> None:
    """Adds numbers of a step to a TensorBoard folder, beside what is there.

    Raises:
        CheckpointError: the disk refused.
    """
    with writing_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Nothing is dropped: checkpoints may be evaluated in any order.
        events = _EventFile(folder, purge_step=2**62)
        events.add_scalars(step, values)
        events.close()


class MetricWriter:
    """Appends to the logs of a run; a context manager that closes them. See `open_writer`.

    Every method raises CheckpointError where the disk refuses.
    """

    def __init__(self, path: Path, events: "_EventFile | None", first_step: int) -> None:
        self._path = path
        self._lines = path.open("a", encoding="utf-8")
        self._events = events
        self._first_step = first_step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends `{"step": ..., "time": unix seconds, **values}`; a kill after that keeps it.

        NaN and infinities become the strings "nan", "inf" and "-inf", which JSON has no numbers
        for.
        """
        assert not {"step", "time"} & values.keys(), "names of the line's own entries"
        numbers = {k: float(v) for k, v in values.items()}
        line = {"step": step, "time": round(time.time(), 3)}
        line |= {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        with writing_explained(self._path):
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self._lines.flush()
            if self._events is not None:
                self._events.add_scalars(step, numbers)

    def text(self, tag: str, markdown: str) -> None:
        """Shows a text in TensorBoard, at the first step; without TensorBoard does nothing."""
        if self._events is not None:
            with writing_explained(self._path):
                self._events.add_text(self._first_step, tag, markdown)

    def image(self, tag: str, step: int, pixels: np.ndarray) -> None:
        """Shows uint8 pixels [H, W, 3] in TensorBoard; without TensorBoard does nothing."""
        if self._events is not None:
            with writing_explained(self._path):
                self._events.add_image(step, tag, pixels)

    def close(self) -> None:
        """Closes both logs."""
        with writing_explained(self._path), contextlib.ExitStack() as stack:
            stack.callback(self._lines.close)
            if self._events is not None:
                stack.callback(self._events.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error, what could not be written fails once more.
        with contextlib.suppress(CheckpointError) if error else contextlib.nullcontext():
            self.close()


class _EventFile:
    """A TensorBoard event file, written at once.

    torch's SummaryWriter writes in a thread, which prints a traceback where the disk is full.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Makes a file of its own; TensorBoard drops what others hold from `purge_step` on."""
        # Imported here: it takes a second, and runs without TensorBoard need not wait.
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        # A module of protobuf, whose classes no type checker sees.
        self._protocol: Any = event_pb2
        self._summary = summary
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._add(0, file_version="brain.Event:2")
        start = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
        self._add(purge_step, session_log=start)
        self._file.flush()

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(step, summary=self._summary.scalar(name, value))
        self._file.flush()

    def add_text(self, step: int, tag: str, markdown: str) -> None:
        self._add(step, summary=self._summary.text(tag, markdown))
        self._file.flush()

    def add_image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._add(step, summary=self._summary.image(tag, pixels, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        event = self._protocol.Event(wall_time=time.time(), step=step, **content)
        self._records.write(event.SerializeToString())


def _drop_after(path: Path, last_step: int) -> None:
    """Rewrites a log without later and unreadable lines; a kill leaves the old file or the new."""
    kept, unreadable = [], 0
    for line in path.read_bytes().splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        if step <= last_step:
            kept.append(line + b"\n")
    if unreadable:
        _log.warning("%s: dropped %d unreadable lines", path, unreadable)
    with written_whole(path) as rewritten:
        rewritten.write_bytes(b"".join(kept))
