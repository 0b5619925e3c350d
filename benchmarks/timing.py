"""Device time of a call, beside a copy of the same size in the same process."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds on the device: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


# Cycles that the GPU sleeps per microsecond of host time, so that it never waits for the host.
CYCLES_PER_US = 3000


def time_device(call: Callable[[], object], repeats: int = 30, warmup: int = 5) -> Timing:
    """Each call behind a flush of the L2 cache and a sleep longer than the host needs for it."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        call()
    sleep = int(CYCLES_PER_US * (time_host(call, repeats=9) + 100))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        torch.cuda._sleep(sleep)
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return _percentiles([start.elapsed_time(end) * 1e3 for start, end in pairs])


def time_replayed(make_call: Callable[[], Callable[[], object]], count: int) -> Timing:
    """Small problems: one CUDA graph of `count` calls, each on inputs of its own.

    Everything happens on one side stream, because a backward runs where its forward ran.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls = [make_call() for _ in range(count)]
        for call in calls[:3] * 3:
            call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            kept = [call() for call in calls]
    torch.cuda.current_stream().wait_stream(side)
    timing = time_device(graph.replay)
    del kept
    return Timing(timing.p20 / count, timing.p50 / count, timing.p80 / count)


def time_host(
    call: Callable[[], object], repeats: int = 21, before: Callable[[], object] = lambda: None
) -> float:
    """Median microseconds the host spends in a call while it runs ahead by up to three."""
    seconds = []
    for i in range(repeats + repeats // 3):
        before()
        if i % 4 == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        # The first after a wait finds cold caches; a trainer does not wait.
        if i % 4:
            seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds) * 1e6


def copy_bytes_per_us(size_bytes: int = 1 << 29) -> float:
    """Bytes read plus written per microsecond by a device-to-device copy of random data."""
    source = torch.randint(-128, 128, (size_bytes,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size_bytes / time_device(lambda: target.copy_(source)).p50


def time_steps(step: Callable[[int], object], count: int) -> list[float]:
    """Milliseconds of each of `count` steps, called with their numbers one after the other."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for i, mark in enumerate(marks[1:]):
        step(i)
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _percentiles(values: list[float]) -> Timing:
    ordered = sorted(values)
    return Timing(*(ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)))
