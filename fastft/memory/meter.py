"""What reads bytes and seconds while a step is measured: a GPU, or a count of fake tensors."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

# Of a GPU that runs as fast as any does; a slower one sleeps longer.
_CYCLES_PER_SECOND = 2e9
# Of the time that the host took for a call before; the next may take longer.
_SLEEP = 1.5


class Meter(Protocol):
    """Bytes that tensors hold, the highest since the last reset, and the time of a call."""

    def allocated(self) -> int:
        """Bytes in tensors now."""
        ...

    def peak(self) -> int:
        """The most since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Begins a new peak, from what is allocated now."""
        ...

    def seconds(
        self, call: Callable[[], object], repeats: int, *, host_ahead: bool = False
    ) -> float:
        """Median time of several calls.

        Args:
            host_ahead: without the waits of a device for its host: a call alone may have them
                where the same call in a step has none, because the host is further ahead there.
        """
        ...


class DeviceMeter:
    """Reads torch's allocator on a GPU and times with events.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        """Bytes in tensors now."""
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """The most since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        """Begins a new peak, when all work so far is done."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def seconds(
        self, call: Callable[[], object], repeats: int, *, host_ahead: bool = False
    ) -> float:
        """Median of several calls; the device sleeps until the host has made them all, if asked."""
        gc.collect()
        if host_ahead:
            self._sleep(_SLEEP * repeats * self._host_seconds(call))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize(self._device)
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3

    def _host_seconds(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def _sleep(self, seconds: float) -> None:
        with torch.cuda.device(self._device):
            torch.cuda._sleep(int(seconds * _CYCLES_PER_SECOND))
