"""How the row-wise kernels divide their work: chosen from benchmarks/results, not at run time."""

from dataclasses import dataclass

import torch

from fastft_kernels.device import multiprocessors, next_power_of_2


@dataclass(frozen=True)
class Schedule:
    """Rows per tile, warps per program, and for persistent kernels stages and programs per SM."""

    rows: int
    warps: int
    stages: int = 1
    programs_per_sm: int = 1


def forward_schedule(columns: int, element_bytes: int) -> Schedule:
    """One tile of rows per program, about 4,096 elements, so that many loads are in flight."""
    block = next_power_of_2(columns)
    rows = max(1, 4096 // block)
    warps = min(16, max(4, rows * block // 1024))
    return Schedule(rows=rows, warps=warps)


def backward_schedule(columns: int, element_bytes: int) -> Schedule:
    """Few persistent programs with deep prefetch: each holds its own sums over rows."""
    block = next_power_of_2(columns)
    rows = max(1, 2048 // block)
    warps = min(32, max(4, rows * block // 512))
    stages = 3 if block * element_bytes <= 16384 else 2
    return Schedule(rows=rows, warps=warps, stages=stages, programs_per_sm=max(1, 16 // warps))


def persistent_programs(schedule: Schedule, tiles: int, device: torch.device) -> int:
    """As many programs as run at once, never more than there are tiles."""
    return max(1, min(tiles, schedule.programs_per_sm * multiprocessors(device)))
