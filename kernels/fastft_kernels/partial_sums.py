"""Second half of a persistent backward: adds the programs' partial rows in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels.device import ceil_div, launch, next_power_of_2
from fastft_kernels.early_launch import early_launch, let_next_start, wait_for_previous


@triton.jit
def _sum_partials_kernel(
    PARTIAL,
    FIRST,
    SECOND,
    programs,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`[2, samples, programs, N]` to two `[samples, N]`; grid (column blocks, samples, 2)."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2).to(tl.int64)
    start = PARTIAL + (which * tl.num_programs(1) + sample) * programs * N
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first in tl.range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        inside = (program < programs)[:, None] & (column < N)[None, :]
        total += tl.load(start + program[:, None] * N + column[None, :], mask=inside, other=0.0)
    value = tl.sum(total, axis=0)
    if which == 0:
        tl.store(FIRST + sample * N + column, value.to(FIRST.dtype.element_ty), mask=column < N)
    else:
        tl.store(SECOND + sample * N + column, value.to(SECOND.dtype.element_ty), mask=column < N)


def sum_partials(partial: Tensor, first: Tensor, second: Tensor) -> None:
    """Adds the programs' rows of `[2, samples, programs, N]` in a fixed order."""
    _, samples, programs, columns = partial.shape
    block_p = min(256, next_power_of_2(programs))
    launch(
        _sum_partials_kernel,
        (ceil_div(columns, 32), samples, 2),
        partial.device,
        partial,
        first,
        second,
        programs,
        N=columns,
        BLOCK_P=block_p,
        BLOCK_N=32,
        num_warps=8,
        **early_launch(partial.device),
    )
