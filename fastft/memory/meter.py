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
# Of the time that the host took for a call before; the next may take longer. At most so many
# seconds: the one before may have compiled.
_SLEEP, _LONGEST = 1.5, 0.5


class Meter(Protocol):
    """Bytes that tensors hold, the highest since the last reset, and the time of a call.

    Attributes:
        steady: equal calls take the same bytes and time, the first too: one tells all.
    """

    steady: bool

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
            host_ahead: without waits for the host: a call alone may have them where the same call
                in a step has none, because the host is further ahead there.
        """
        ...


class DeviceMeter:
    """Reads torch's allocator on a GPU and times with events.

    Args:
        device: the GPU.
    """

    steady = False

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
        """Median of several calls, behind one that is not timed.

        The device sleeps first, so that the host is ahead as in a run. Where it falls behind, a
        call takes what the host takes.
        """
        gc.collect()
        host = self._host_seconds(call)
        with torch.cuda.device(self._device):
            sleep = min(_LONGEST, host * (_SLEEP * repeats if host_ahead else 1))
            torch.cuda._sleep(int(sleep * _CYCLES_PER_SECOND))
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            hosts = []
            marks[0].record()
            for mark in marks[1:]:
                begin = time.perf_counter()
                call()
                mark.record()
                hosts.append(time.perf_counter() - begin)
            torch.cuda.synchronize()
        times = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
        device = statistics.median(times)
        return device if host_ahead else max(device, statistics.median(hosts))

    def _host_seconds(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
