"""How the row-wise kernels divide their work: chosen from benchmarks/results, not at run time."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft_kernels.device import (
    ceil_div,
    memory_bandwidth,
    multiprocessors,
    next_power_of_2,
    shared_memory_bytes,
)

# A backward's prefetch of a row's mean and rstd.
_ROW_BYTES = 8


@dataclass(frozen=True)
class Schedule:
    """Rows per tile, warps per program, stages of prefetch.

    programs_per_sm: persistent programs per multiprocessor that share the tiles; 0 for a program
        per tile.
    chunk: columns per pass; 0 for whole rows at once.
    """

    rows: int
    warps: int
    stages: int = 1
    programs_per_sm: int = 0
    chunk: int = 0


def element_bytes(*streams: Tensor | None) -> int:
    """Bytes that one element's prefetch takes in shared memory."""
    return sum(0 if stream is None else stream.element_size() for stream in streams)


def _stages(wanted: int, tile_bytes: int, device: torch.device) -> int:
    """As many stages as shared memory holds, with one tile's room for exchanges besides."""
    fitting = shared_memory_bytes(device) // tile_bytes - 1
    return max(1, min(wanted, fitting))


def forward_schedule(
    columns: int, rows: int, weight_bytes: int, device: torch.device, *, alone: bool
) -> Schedule:
    """A program per tile; long rows with float32 weights in passes.

    A float32 weight and bias are four times the bytes of a bf16 row: a program should use them for
    several rows, which beyond 4,096 columns do not fit its registers. A micro-batch needs small
    tiles to fill the GPU. Each is within 5 % of the best of 19 on an H100 and on an H200, which
    moves 40 % more with as many multiprocessors: fewer warps, of more elements each, win there.
    Beyond 4,096 columns each card has its own.

    Args:
        weight_bytes: per element of the wider of weight and bias, 0 without them.
        alone: whether a row is all that is read: no residual, and no modulation of its sample.
    """
    block = next_power_of_2(columns)
    few = rows * block < 16 * multiprocessors(device) * 8192
    if few and block <= 512:
        return Schedule(rows=1024 // block, warps=2)
    fast = memory_bandwidth(device) > 4e12
    if weight_bytes <= 2:
        # On an H100 rows of 16,384 take 464 us one by one, 362 in pairs; of 12,288 358 and 380.
        if alone and (block == 8192 if fast else columns == 16384):
            return Schedule(rows=2, warps=block // 1024)
        return Schedule(rows=max(2048, block) // block, warps=max(2, block // 1024))
    if block <= 1024:
        return Schedule(rows=4096 // block, warps=4)
    if block <= 4096:
        return Schedule(rows=4 if alone and not few else 2, warps=block // 512)
    if fast:
        return Schedule(rows=1, warps=8, chunk=2048)
    if alone:
        return Schedule(rows=1, warps=16, chunk=block // 4)
    return Schedule(rows=1, warps=block // 1024)


def adaptive_schedule(
    columns: int, rows: int, modulation_bytes: int, bytes_each: int, device: torch.device
) -> Schedule:
    """As `forward_schedule`; long rows of samples with a wide modulation are not read twice, but by
    programs that load the modulation once, and rows ahead.

    Args:
        modulation_bytes: per element of the wider of scale and shift.
        bytes_each: from `element_bytes`.
    """
    block = next_power_of_2(columns)
    if modulation_bytes <= 2 or block <= 4096:
        return forward_schedule(columns, rows, modulation_bytes, device, alone=False)
    stages = _stages(3, block * bytes_each, device)
    return Schedule(rows=1, warps=max(8, block // 1024), stages=stages, programs_per_sm=16)


def backward_schedule(columns: int, bytes_each: int, device: torch.device) -> Schedule:
    """Persistent programs: two of four warps per multiprocessor, or one with longer rows or more to
    read for each element.

    Args:
        bytes_each: from `element_bytes`.
    """
    block = next_power_of_2(columns)
    if bytes_each <= 4:
        tile = max(4096 if block <= 2048 else 8192, block)
        warps, wanted, together = tile // 1024, 3, 2 if tile == 4096 else 1
    else:
        tile = max(4096, block)
        warps = 8 if block <= 2048 else min(32, max(16, block // 512))
        wanted, together = 4 if tile == 4096 else 3, 1
    rows = tile // block
    stages = _stages(wanted, together * (tile * bytes_each + rows * _ROW_BYTES), device)
    return Schedule(rows, warps, stages, together)


def programs(schedule: Schedule, rows: int, device: torch.device) -> int:
    """How many programs to launch; never more than there are tiles."""
    tiles = ceil_div(rows, schedule.rows)
    if not schedule.programs_per_sm:
        return tiles
    return max(1, min(tiles, schedule.programs_per_sm * multiprocessors(device)))


@functools.lru_cache(maxsize=256)
def programs_per_sample(at_once: int, samples: int, tiles: int) -> int:
    """How many persistent programs share one sample, at_once of them running at a time.

    The fewest that keep 95 % of the GPU busy, within 16 waves: with 132 at once and 16 samples,
    8 programs each make one wave of 128, while 9 would make a second wave of 12.
    """
    ideal = samples * tiles / at_once
    best, best_share = 1, 0.0
    most = min(tiles, 16 * at_once // samples + 1)
    for count in range(1, most + 1):
        share = ideal / (ceil_div(samples * count, at_once) * ceil_div(tiles, count))
        if share > best_share + 1e-9:
            best, best_share = count, share
        if best_share >= 0.95:
            break
    return best
