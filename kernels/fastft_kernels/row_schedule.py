"""How the row-wise kernels divide their work: chosen from benchmarks/results, not at run time."""

from dataclasses import dataclass

import torch

from fastft_kernels.device import multiprocessors, next_power_of_2


@dataclass(frozen=True)
class Schedule:
    """Rows per tile, warps per program, stages of prefetch.

    programs_per_sm: persistent programs per multiprocessor that share the tiles; 0 for a program
        per tile.
    """

    rows: int
    warps: int
    stages: int = 1
    programs_per_sm: int = 0


def forward_schedule(columns: int, element_bytes: int) -> Schedule:
    """Short rows: a program per tile of 8,192 elements. Long ones: persistent, with prefetch.

    Weight and bias in float32 are twice the bytes of a bf16 row, from the L2 cache: a program must
    use them for several rows, which beyond 4,096 columns only fit one after the other.
    """
    block = next_power_of_2(columns)
    if block <= 4096:
        return Schedule(rows=max(1, 8192 // block), warps=8)
    return Schedule(rows=1, warps=min(32, block // 512), stages=3, programs_per_sm=1)


def backward_schedule(columns: int, element_bytes: int) -> Schedule:
    """One persistent program per multiprocessor, tiles of 4,096 elements, three in flight."""
    block = next_power_of_2(columns)
    if block <= 2048:
        return Schedule(rows=4096 // block, warps=8, stages=4, programs_per_sm=1)
    if block == 4096:
        return Schedule(rows=1, warps=16, stages=4, programs_per_sm=1)
    stages = 3 if block == 8192 else 2
    return Schedule(rows=1, warps=min(32, block // 512), stages=stages, programs_per_sm=1)


def programs(schedule: Schedule, tiles: int, device: torch.device) -> int:
    """How many programs to launch; never more than there are tiles."""
    if not schedule.programs_per_sm:
        return tiles
    return max(1, min(tiles, schedule.programs_per_sm * multiprocessors(device)))
