"""Layer norm forward of a long row with wide weights, in two passes over chunks of it.

Beyond 4,096 columns a float32 weight and bias are four times the bytes of a bf16 row, and a program
that holds the row in registers leaves no room for others to hide what it waits for. Here a row is
read twice, the second time from the cache, where the weights stay too.
"""

import triton
import triton.language as tl

from fastft_kernels.early_launch import let_next_start, wait_for_previous


@triton.jit
def _combine(mean_a, squares_a, count_a, mean_b, squares_b, count_b):
    """Joins two means and sums of squares about them (Chan, Golub, LeVeque 1983)."""
    count = count_a + count_b
    share = tl.where(count > 0, count_b / count, 0.0)
    delta = mean_b - mean_a
    mean = mean_a + delta * share
    return mean, squares_a + squares_b + delta * delta * count_a * share, count


@triton.jit
def forward_in_passes(
    X,
    RESIDUAL,
    S,
    WEIGHT,
    BIAS,
    Y,
    MEAN,
    RSTD,
    x_stride,
    residual_stride,
    rows,
    eps,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per row; arguments as of `layer_norm`'s forward kernel."""
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    X += row * x_stride
    RESIDUAL += row * residual_stride
    S += row * N
    mean = tl.zeros([CHUNK], tl.float32)
    squares = tl.zeros([CHUNK], tl.float32)
    count = tl.zeros([CHUNK], tl.float32)
    for start in range(0, N, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < N
        # What is read twice stays in the cache: the row, or its sum with the residual.
        if HAS_RESIDUAL:
            x = tl.load(X + column, mask=inside, other=0.0, eviction_policy="evict_first")
            at = RESIDUAL + column
            added = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
            # Normalise what is stored, so that backward sees the same numbers.
            s = (x.to(tl.float32) + added.to(tl.float32)).to(S.dtype.element_ty)
            tl.store(S + column, s, mask=inside)
        else:
            s = tl.load(X + column, mask=inside, other=0.0, eviction_policy="evict_last")
        x = s.to(tl.float32)
        count += tl.where(inside, 1.0, 0.0)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        squares += tl.where(inside, delta * (x - mean), 0.0)
    mean, squares, count = tl.reduce((mean, squares, count), 0, _combine)
    let_next_start(EARLY)
    rstd = 1.0 / tl.sqrt(squares / N + eps)
    if HAS_RESIDUAL:
        # Other threads of the program stored what this one reads.
        tl.debug_barrier()
    for start in range(0, N, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < N
        at = (S if HAS_RESIDUAL else X) + column
        s = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
        y = (s.to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            weight = tl.load(WEIGHT + column, mask=inside, other=0.0, eviction_policy="evict_last")
            y *= weight.to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(BIAS + column, mask=inside, other=0.0, eviction_policy="evict_last")
            y += bias.to(tl.float32)
        tl.store(Y + row * N + column, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)
