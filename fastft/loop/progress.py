"""Progress on a terminal as a bar, elsewhere as one line per log point."""

import resource
import sys
import time
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SHOWN = {
    "train/loss": "loss {:.4g}",
    "gradients/norm": "grad {:.3g}",
    "speed/samples_per_second": "{:,.0f} samples/s",
    "memory/peak_gib": "{:.2f} GiB",
}


class Progress:
    """Shows how far a run is.

    Args:
        console: where to; a bar if it is a terminal, lines if not.
        first: steps done before this process.
        total: steps in all.

    Attributes:
        step_seconds: time the host spent in steps, hooks left out.
    """

    def __init__(self, console: Console, first: int, total: int) -> None:
        self.console = console
        self.step_seconds = 0.0
        self._total = total
        self._first = first
        self._began = time.perf_counter()
        self._bar = Bar(
            # Narrow, so that the values fit beside it on 80 columns.
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("step", total=total, completed=first, values="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, done: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=done)

    def report(self, done: int, values: Mapping[str, float]) -> None:
        """Shows the values of a log point."""
        shown = [text.format(values[name]) for name, text in _SHOWN.items()]
        if self.console.is_terminal:
            self._bar.update(self._task, values="  ".join(shown))
        else:
            eta = f"eta {self._eta(done)}"
            self._print("  ".join([f"step {done}/{self._total}", *shown, eta]))

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _eta(self, done: int) -> str:
        per_step = (time.perf_counter() - self._began) / max(1, done - self._first)
        seconds = int(per_step * (self._total - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: in torch's allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
