"""Adaptive layer norm: scale and shift per sample, with or without a residual (FiLM, DiT, Aurora).

Formula: y = (residual +) h * (1 + scale) + shift with h = (x - mean(x)) / sqrt(var(x) + eps) over
the last dimension. Backward, with c = dy * (1 + scale):
dx = rstd * (c - mean(c) - h * mean(c * h)); dscale = sum over the sample's rows of dy * h;
dshift = sum over the sample's rows of dy; dresidual = dy.

Shapes: x, residual, y `[B, ..., N]`, N <= 16384; scale, shift `[B, N]`.
Numerics: float32 inside; mean and rstd kept in float32; y has `out_dtype`, with a residual the
wider of that and the residual's dtype.
Memory: each of x, residual, y (backward: dy, x, dx) moves once: 4 or 6 bytes per element forward
and 6 backward in bf16. Kept for backward: x, scale, 8 bytes per row. The sums over rows go through
a fixed number of float32 rows per sample, so dscale and dshift are the same bits every time.
Source: Perez et al. 2018 (arXiv 1709.07871); Peebles, Xie 2023 (arXiv 2212.09748).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels.device import (
    as_rows,
    ceil_div,
    check_columns,
    launch,
    multiprocessors,
    next_power_of_2,
    output_dtype,
    runs_triton,
)
from fastft_kernels.dispatch import as_differentiable_op, as_op
from fastft_kernels.early_launch import early_launch, let_next_start, wait_for_previous
from fastft_kernels.norm_formulas import plain_adaptive_backward, statistics
from fastft_kernels.partial_sums import sum_partials
from fastft_kernels.row_schedule import (
    Schedule,
    adaptive_schedule,
    backward_schedule,
    element_bytes,
    programs_per_sample,
)


def reference(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The formula in plain torch, in the dtype of the inputs."""
    per_row = (len(x),) + (1,) * (x.dim() - 2) + (x.shape[-1],)
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.view(per_row)) + shift.view(per_row)
    return y if residual is None else residual + y


@triton.jit
def _modulation(SCALE, SHIFT, sample, column, N: tl.constexpr):
    at = sample * N + column
    scale = tl.load(SCALE + at, mask=column < N, other=0.0).to(tl.float32)
    return 1.0 + scale, tl.load(SHIFT + at, mask=column < N, other=0.0).to(tl.float32)


@triton.jit
def _forward_tile(
    tile,
    pointers,
    sizes,
    kept,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Norms ROWS rows of a sample; kept is (1 + scale, shift) where the program has them."""
    X, RESIDUAL, SCALE, SHIFT, Y, MEAN, RSTD = pointers
    x_stride, residual_stride, length, eps = sizes
    sample = tl.program_id(1).to(tl.int64)
    position = tile * ROWS + tl.arange(0, ROWS)
    row = sample * length + position
    column = tl.arange(0, BLOCK_N)
    in_row = (column < N)[None, :]
    inside = (position < length)[:, None] & in_row
    x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        at = row[:, None] * residual_stride + column[None, :]
        residual = tl.load(RESIDUAL + at, mask=inside, other=0.0)
    if kept is None:
        kept = _modulation(SCALE, SHIFT, sample, column, N)
    let_next_start(EARLY)
    x = x.to(tl.float32)
    mean = tl.sum(x, axis=1) / N
    centred = tl.where(in_row, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps)
    y = centred * rstd[:, None] * kept[0][None, :] + kept[1][None, :]
    if HAS_RESIDUAL:
        y += residual.to(tl.float32)
    tl.store(Y + row[:, None] * N + column[None, :], y.to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean, mask=position < length)
    tl.store(RSTD + row, rstd, mask=position < length)


@triton.jit
def _forward_kernel(
    X,
    RESIDUAL,
    SCALE,
    SHIFT,
    Y,
    MEAN,
    RSTD,
    x_stride,
    residual_stride,
    length,
    eps,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    pointers = (X, RESIDUAL, SCALE, SHIFT, Y, MEAN, RSTD)
    sizes = (x_stride, residual_stride, length, eps)
    first = tl.program_id(0)
    if PERSISTENT:
        column = tl.arange(0, BLOCK_N)
        kept = _modulation(SCALE, SHIFT, tl.program_id(1).to(tl.int64), column, N)
        tiles = tl.cdiv(length, ROWS)
        for tile in tl.range(first, tiles, tl.num_programs(0), num_stages=STAGES):
            _forward_tile(tile, pointers, sizes, kept, N, BLOCK_N, ROWS, HAS_RESIDUAL, False)
    else:
        _forward_tile(first, pointers, sizes, None, N, BLOCK_N, ROWS, HAS_RESIDUAL, EARLY)


@triton.jit
def _backward_kernel(
    DY,
    X,
    SCALE,
    MEAN,
    RSTD,
    DX,
    PARTIAL,
    dy_stride,
    x_stride,
    length,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    in_row = (column < N)[None, :]
    scale = tl.load(SCALE + sample * N + column, mask=column < N, other=0.0).to(tl.float32)
    scale = (1.0 + scale)[None, :]
    dscale = tl.zeros([ROWS, BLOCK_N], tl.float32)
    dshift = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(length, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        position = tile * ROWS + tl.arange(0, ROWS)
        row = sample * length + position
        inside = (position < length)[:, None] & in_row
        dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0)
        x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        mean = tl.load(MEAN + row, mask=position < length, other=0.0)
        rstd = tl.load(RSTD + row, mask=position < length, other=0.0)
        dy = dy.to(tl.float32)
        h = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        c = dy * scale
        c_mean = tl.sum(c, axis=1) / N
        ch_mean = tl.sum(c * h, axis=1) / N
        dx = (c - c_mean[:, None] - h * ch_mean[:, None]) * rstd[:, None]
        tl.store(DX + row[:, None] * N + column[None, :], dx.to(DX.dtype.element_ty), mask=inside)
        dscale += dy * h
        dshift += dy
    let_next_start(EARLY)
    at = PARTIAL + (sample * tl.num_programs(0) + tl.program_id(0)) * N + column
    tl.store(at, tl.sum(dscale, axis=0), mask=column < N)
    at += tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * N
    tl.store(at, tl.sum(dshift, axis=0), mask=column < N)


def _programs(schedule: Schedule, length: int, samples: int, device: torch.device) -> int:
    tiles = ceil_div(length, schedule.rows)
    if not schedule.programs_per_sm:
        return tiles
    at_once = schedule.programs_per_sm * multiprocessors(device)
    return programs_per_sample(at_once, samples, tiles)


def _launch_forward(x, scale, shift, residual, eps, out) -> None:
    y, mean, rstd = out
    columns = x.shape[-1]
    rows = as_rows(x, columns)
    added = rows if residual is None else as_rows(residual, columns)
    if not len(rows):
        return
    samples, length = len(scale), len(rows) // len(scale)
    wide = max(scale.element_size(), shift.element_size())
    each = element_bytes(x, residual)
    schedule = adaptive_schedule(columns, len(rows), wide, each, x.device)
    launch(
        _forward_kernel,
        (_programs(schedule, length, samples, x.device), samples),
        x.device,
        *(rows, added, scale.contiguous(), shift.contiguous(), y, mean, rstd),
        *(rows.stride(0), added.stride(0), length, eps),
        N=columns,
        BLOCK_N=next_power_of_2(columns),
        ROWS=schedule.rows,
        STAGES=schedule.stages,
        PERSISTENT=schedule.programs_per_sm > 0,
        HAS_RESIDUAL=residual is not None,
        num_warps=schedule.warps,
        **early_launch(x.device),
    )


def _forward_cpu(x, scale, shift, residual, eps, out) -> None:
    y, mean, rstd = out
    for kept, found in zip((mean, rstd), statistics(x.reshape(-1, x.shape[-1]), eps), strict=True):
        kept.copy_(found)
    residual = residual if residual is None else residual.float()
    y.copy_(reference(x.float(), scale.float(), shift.float(), residual, eps))


def _run_forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    out = _forward_fake(x, scale, shift, residual, eps, out_dtype)
    run = _launch_forward if runs_triton(x) else _forward_cpu
    run(x, scale, shift, residual, eps, out)
    return out


def _forward_fake(x, scale, shift, residual, eps, out_dtype):
    rows = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype), mean, rstd


def _launch_backward(dy, x, scale, mean, rstd, out) -> None:
    dx, dscale, dshift = out
    columns, samples = x.shape[-1], len(scale)
    dy, x = as_rows(dy, columns), as_rows(x, columns)
    if not len(x):
        dscale.zero_()
        dshift.zero_()
        return
    length = len(x) // samples
    schedule = backward_schedule(columns, element_bytes(dy, x), x.device)
    grid = _programs(schedule, length, samples, x.device)
    partial = x.new_empty((2, samples, grid, columns), dtype=torch.float32)
    launch(
        _backward_kernel,
        (grid, samples),
        x.device,
        *(dy, x, scale.contiguous(), mean, rstd, dx, partial),
        *(dy.stride(0), x.stride(0), length),
        N=columns,
        BLOCK_N=next_power_of_2(columns),
        ROWS=schedule.rows,
        STAGES=schedule.stages,
        num_warps=schedule.warps,
        **early_launch(x.device),
    )
    sum_partials(partial, dscale, dshift)


def _backward_cpu(dy, x, scale, mean, rstd, out) -> None:
    for kept, value in zip(out, plain_adaptive_backward(dy, x, scale, mean, rstd), strict=True):
        kept.copy_(value)


def _run_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift)."""
    out = _backward_fake(dy, x, scale, mean, rstd)
    run = _launch_backward if runs_triton(x) else _backward_cpu
    run(dy, x, scale, mean, rstd, out)
    return out


def _backward_fake(dy, x, scale, mean, rstd):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


_backward = as_op("fastft::adaptive_norm_backward", _run_backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    x, scale, shift, residual, eps, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype, ctx.eps = shift.dtype, eps
    ctx.residual_dtype = None if residual is None else residual.dtype


def _autograd(ctx, dy, _dmean, _drstd):
    x, scale, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    if torch.is_grad_enabled():
        # create_graph=True: plain torch, which autograd can differentiate again.
        mean, rstd = statistics(x.reshape(-1, x.shape[-1]), ctx.eps)
        dx, dscale, dshift = plain_adaptive_backward(dy, x, scale, mean, rstd)
        dx, dscale = dx.to(x.dtype), dscale.to(scale.dtype)
    else:
        dx, dscale, dshift = _backward(dy, x, scale, mean, rstd)
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return dx, dscale, dshift.to(ctx.shift_dtype), dresidual, None, None


_forward = as_differentiable_op(
    "fastft::adaptive_norm_forward", _run_forward, _forward_fake, _setup_context, _autograd
)


def adaptive_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(residual +) norm(x) * (1 + scale) + shift, with scale and shift per sample.

    Raises:
        ValueError: shapes other than `[B, ..., N]` and `[B, N]`, rows longer than 16,384, or
            a dtype that is not a float of 16 or 32 bits.
    """
    check_columns("adaptive_layer_norm", x)
    wanted = (x.shape[0], x.shape[-1])
    if x.dim() < 2 or scale.shape != wanted or shift.shape != wanted:
        raise ValueError(
            f"adaptive_layer_norm: scale and shift must be [B, N] for x [B, ..., N]; got "
            f"{tuple(scale.shape)}, {tuple(shift.shape)} for {tuple(x.shape)}; squeeze them"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"adaptive_layer_norm: residual must have x's shape {tuple(x.shape)}; got "
            f"{tuple(residual.shape)}; expand it"
        )
    dtype = output_dtype(x)
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    return _forward(x, scale, shift, residual, eps, dtype)[0]
