"""Layer norm, alone or behind a residual add.

Formula: s = x (+ residual); y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, over the last
dimension. Backward, with h = (s - mean) * rstd and c = dy * weight:
ds = rstd * (c - mean(c) - h * mean(c * h)) (+ grad of s); dweight = sum(dy * h); dbias = sum(dy).

Shapes: x, residual, y, s `[..., N]`, N <= 16384; weight, bias `[N]` or None.
Numerics: float32 inside; variance around the mean, not E[x^2] - mean^2; mean and rstd kept in
float32. y has `out_dtype`; s has the wider of the two input dtypes.
Memory: forward moves x and y once (and residual and s), backward dy, s and ds once: 4 / 6 bytes per
element in bf16, 8 / 8 with the residual. Kept for backward: s, and 8 bytes per row. The sums over
rows go through one float32 row per program, so their size follows the device, not the batch.
Source: Ba, Kiros, Hinton 2016 (arXiv 1607.06450).
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
    next_power_of_2,
    output_dtype,
    runs_triton,
)
from fastft_kernels.dispatch import as_differentiable_op, as_op
from fastft_kernels.early_launch import early_launch, let_next_start, wait_for_previous
from fastft_kernels.long_rows import forward_in_passes
from fastft_kernels.norm_formulas import plain_norm_backward, statistics
from fastft_kernels.partial_sums import sum_partials
from fastft_kernels.row_schedule import (
    backward_schedule,
    element_bytes,
    forward_schedule,
    programs,
)


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, s) in plain torch, in the dtype of the inputs."""
    s = x if residual is None else x + residual
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s


@triton.jit
def _forward_kernel(
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
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    in_row = column < N
    inside = (row < rows)[:, None] & in_row[None, :]
    out = row[:, None] * N + column[None, :]
    # The rows first: they come from further away than the weights.
    x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if HAS_RESIDUAL:
        at = row[:, None] * residual_stride + column[None, :]
        x += tl.load(RESIDUAL + at, mask=inside, other=0.0).to(tl.float32)
        # Normalise what is stored, so that backward sees the same numbers.
        s = x.to(S.dtype.element_ty)
        tl.store(S + out, s, mask=inside)
        x = s.to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(WEIGHT + column, mask=in_row, other=0.0, eviction_policy="evict_last")
    if HAS_BIAS:
        bias = tl.load(BIAS + column, mask=in_row, other=0.0, eviction_policy="evict_last")
    let_next_start(EARLY)
    mean = tl.sum(x, axis=1) / N
    centred = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= weight.to(tl.float32)[None, :]
    if HAS_BIAS:
        y += bias.to(tl.float32)[None, :]
    tl.store(Y + out, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean, mask=row < rows)
    tl.store(RSTD + row, rstd, mask=row < rows)


@triton.jit
def _backward_kernel(
    DY,
    DS,
    S,
    WEIGHT,
    MEAN,
    RSTD,
    DX,
    PARTIAL,
    dy_stride,
    ds_stride,
    s_stride,
    rows,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_DS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WANTS_SUMS: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    column = tl.arange(0, BLOCK_N)
    in_row = (column < N)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(WEIGHT + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_N], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & in_row
        dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0)
        s = tl.load(S + row[:, None] * s_stride + column[None, :], mask=inside, other=0.0)
        mean = tl.load(MEAN + row, mask=row < rows, other=0.0)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        dy = dy.to(tl.float32)
        h = (s.to(tl.float32) - mean[:, None]) * rstd[:, None]
        c = dy * weight if HAS_WEIGHT else dy
        c_mean = tl.sum(c, axis=1) / N
        ch_mean = tl.sum(c * h, axis=1) / N
        dx = (c - c_mean[:, None] - h * ch_mean[:, None]) * rstd[:, None]
        if HAS_DS:
            at = row[:, None] * ds_stride + column[None, :]
            dx += tl.load(DS + at, mask=inside, other=0.0).to(tl.float32)
        at = row[:, None] * N + column[None, :]
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
        if WANTS_SUMS:
            dweight += dy * h
            dbias += dy
    let_next_start(EARLY)
    if WANTS_SUMS:
        at = PARTIAL + tl.program_id(0).to(tl.int64) * N + column
        tl.store(at, tl.sum(dweight, axis=0), mask=column < N)
        at += tl.num_programs(0).to(tl.int64) * N
        tl.store(at, tl.sum(dbias, axis=0), mask=column < N)


def _launch_forward(x, residual, weight, bias, eps, out) -> None:
    y, s, mean, rstd = out
    columns = x.shape[-1]
    rows = as_rows(x, columns)
    added = rows if residual is None else as_rows(residual, columns)
    if not len(rows):
        return
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    wide = max(0 if t is None else t.element_size() for t in (weight, bias))
    schedule = forward_schedule(columns, len(rows), wide, x.device, alone=residual is None)
    kernel, tile = _forward_kernel, {"BLOCK_N": next_power_of_2(columns), "ROWS": schedule.rows}
    if schedule.chunk:
        kernel, tile = forward_in_passes, {"CHUNK": schedule.chunk}
    launch(
        kernel,
        (ceil_div(len(rows), schedule.rows),),
        x.device,
        *(rows, added, s, weight, bias, y, mean, rstd),
        *(rows.stride(0), added.stride(0), len(rows), eps),
        N=columns,
        **tile,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        num_warps=schedule.warps,
        **early_launch(x.device),
    )


def _forward_cpu(x, residual, weight, bias, eps, out) -> None:
    y, s, mean, rstd = out
    if residual is not None:
        s.copy_(x.float() + residual.float())
        x = s
    for kept, found in zip((mean, rstd), statistics(x.reshape(-1, x.shape[-1]), eps), strict=True):
        kept.copy_(found)
    weight, bias = (t if t is None else t.float() for t in (weight, bias))
    y.copy_(F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps))


def _run_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, mean, rstd); s is empty without a residual, because it would be x."""
    out = _forward_fake(x, residual, weight, bias, eps, out_dtype)
    run = _launch_forward if runs_triton(x) else _forward_cpu
    run(x, residual, weight, bias, eps, out)
    return out


def _forward_fake(x, residual, weight, bias, eps, out_dtype):
    rows = x.numel() // x.shape[-1]
    s_shape = (0,) if residual is None else x.shape
    s_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    y, s = x.new_empty(x.shape, dtype=out_dtype), x.new_empty(s_shape, dtype=s_dtype)
    return y, s, mean, rstd


def _launch_backward(dy, ds, s, weight, mean, rstd, wants_sums, out) -> None:
    dx, dweight, dbias = out
    columns = s.shape[-1]
    dy, s = as_rows(dy, columns), as_rows(s, columns)
    if not len(s):
        dweight.zero_()
        dbias.zero_()
        return
    weight = weight if weight is None else weight.contiguous()
    schedule = backward_schedule(columns, element_bytes(dy, s, ds), s.device)
    has_ds = ds is not None
    ds = as_rows(ds, columns) if has_ds else dy
    grid = programs(schedule, len(s), s.device)
    shape = (2, 1, grid, columns) if wants_sums else (0,)
    partial = s.new_empty(shape, dtype=torch.float32)
    launch(
        _backward_kernel,
        (grid,),
        s.device,
        *(dy, ds, s, weight, mean, rstd, dx, partial),
        *(dy.stride(0), ds.stride(0), s.stride(0), len(s)),
        N=columns,
        BLOCK_N=next_power_of_2(columns),
        ROWS=schedule.rows,
        STAGES=schedule.stages,
        HAS_DS=has_ds,
        HAS_WEIGHT=weight is not None,
        WANTS_SUMS=wants_sums,
        num_warps=schedule.warps,
        **early_launch(s.device),
    )
    if wants_sums:
        sum_partials(partial, dweight, dbias)


def _backward_cpu(dy, ds, s, weight, mean, rstd, wants_sums, out) -> None:
    found = plain_norm_backward(dy, ds, s, weight, mean, rstd)
    for kept, value in zip(out, found if wants_sums else found[:1], strict=False):
        kept.copy_(value)


def _run_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wants_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); the last two are empty unless wanted."""
    out = _backward_fake(dy, ds, s, weight, mean, rstd, wants_sums)
    run = _launch_backward if runs_triton(s) else _backward_cpu
    run(dy, ds, s, weight, mean, rstd, wants_sums, out)
    return out


def _backward_fake(dy, ds, s, weight, mean, rstd, wants_sums):
    shape = s.shape[-1:] if wants_sums else (0,)
    dtype = torch.float32 if weight is None else weight.dtype
    return s.new_empty(s.shape), s.new_empty(shape, dtype=dtype), s.new_empty(shape, dtype=dtype)


_backward = as_op("fastft::layer_norm_backward", _run_backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, eps, _ = inputs
    _, s, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, bias))
    ctx.eps = eps


def _autograd(ctx, dy, ds, _dmean, _drstd):
    s, weight, mean, rstd = ctx.saved_tensors
    x_dtype, residual_dtype, bias_dtype = ctx.dtypes
    ds = None if residual_dtype is None else ds
    dy = torch.zeros_like(s) if dy is None else dy
    wants_weight, wants_bias = ctx.needs_input_grad[2:4]
    if torch.is_grad_enabled():
        # create_graph=True: plain torch, which autograd can differentiate again.
        mean, rstd = statistics(s.reshape(-1, s.shape[-1]), ctx.eps)
        dx, dweight, dbias = plain_norm_backward(dy, ds, s, weight, mean, rstd)
    else:
        dx, dweight, dbias = _backward(dy, ds, s, weight, mean, rstd, wants_weight or wants_bias)
    return (
        dx.to(x_dtype),
        None if residual_dtype is None else dx.to(residual_dtype),
        dweight.to(weight.dtype) if wants_weight else None,
        dbias.to(bias_dtype) if wants_bias else None,
        None,
        None,
    )


_forward = as_differentiable_op(
    "fastft::layer_norm_forward", _run_forward, _forward_fake, _setup_context, _autograd
)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Norm over the last dimension; in the autocast dtype under autocast, else in x's dtype.

    Raises:
        ValueError: a dtype that is not a float of 16 or 32 bits, a row longer than 16,384, or a
            weight or bias of another length.
    """
    check_columns("layer_norm", x, weight, bias)
    return _forward(x, None, weight, bias, eps, output_dtype(x))[0]


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual) in one pass: the pre-norm block's two uses of the sum."""
    check_columns("residual_layer_norm", x, weight, bias)
    if x.shape != residual.shape:
        raise ValueError(
            f"residual_layer_norm: x and residual must have one shape; got {tuple(x.shape)} and "
            f"{tuple(residual.shape)}; expand the smaller one"
        )
    y, s, _, _ = _forward(x, residual, weight, bias, eps, output_dtype(x))
    return y, s
