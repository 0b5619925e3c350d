"""Numbers of a run on disk: `metrics.jsonl`, one JSON object a line, and TensorBoard events."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)


def open_writer(folder: Path, *, tensorboard: bool, first_step: int) -> "MetricWriter":
    """Opens the run folder's logs to go on after `first_step` finished steps; 0 starts them anew.

    What an interrupted run wrote after its last checkpoint is dropped, so that every step is
    logged once: lines of later steps and a line cut short by a kill. TensorBoard is told to ignore
    later events.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last_step = first_step if first_step else -1
    path = folder / "metrics.jsonl"
    if path.exists():
        _drop_after(path, last_step)
    events = None
    if tensorboard:
        # Imported here: it takes a second, and runs without TensorBoard need not wait.
        from torch.utils.tensorboard import SummaryWriter

        events = SummaryWriter(folder / "tensorboard", purge_step=last_step + 1, flush_secs=10)
    return MetricWriter(path, events, first_step)


class MetricWriter:
    """Appends to the logs of a run; a context manager that closes them. See `open_writer`."""

    def __init__(self, path: Path, events: "SummaryWriter | None", first_step: int) -> None:
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
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)

    def text(self, tag: str, markdown: str) -> None:
        """Shows a text in TensorBoard, at the first step; without TensorBoard does nothing."""
        if self._events is not None:
            self._events.add_text(tag, markdown, self._first_step)

    def close(self) -> None:
        """Closes both logs."""
        self._lines.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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
    rewritten = path.with_name(path.name + ".tmp")
    with rewritten.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    rewritten.replace(path)
