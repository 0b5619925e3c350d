"""The time of some steps without the profiler, which slows the host down."""

import contextlib
import time
from collections.abc import Iterator

import torch

from fastft.config import ProfileConfig

# Beyond this share of the time between begin and end, what ran between the steps (an evaluation, a
# checkpoint) makes the mean worthless.
_BETWEEN_LIMIT = 0.05


class Stopwatch:
    """Times as many steps as are profiled, up to the one that warms the profiler up.

    They run on as always: the device is waited for before the first and after the last alone.

    Attributes:
        mean_ms: per step; None: not measured, because the run began later, there are no such steps,
            or too much else ran between them.
    """

    def __init__(self, config: ProfileConfig, device: torch.device) -> None:
        self._device = device
        end = config.at_step - 1
        self._steps = range(max(0, end - config.steps), end)
        self._began: float | None = None
        self._left = self._between = 0.0
        self.mean_ms: float | None = None

    @contextlib.contextmanager
    def around(self, index: int) -> Iterator[None]:
        """Encloses step `index`."""
        if index not in self._steps:
            yield
            return
        if index == self._steps.start:
            synchronize(self._device)
            self._began = self._left = time.perf_counter()
        self._between += time.perf_counter() - self._left
        yield
        if index == self._steps.stop - 1 and self._began is not None:
            synchronize(self._device)
            seconds = time.perf_counter() - self._began
            if self._between <= _BETWEEN_LIMIT * seconds:
                self.mean_ms = seconds / len(self._steps) * 1e3
        self._left = time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
