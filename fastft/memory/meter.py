"""What reads bytes and seconds while a step is measured: a GPU, or a count of fake tensors."""

import gc
import itertools
import statistics
from collections.abc import Callable
from typing import Protocol

import torch


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

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Median time of several calls."""
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

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Median of several calls."""
        gc.collect()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize(self._device)
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3
