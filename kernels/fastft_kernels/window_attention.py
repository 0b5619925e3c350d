"""Attention within windows of a 3D grid, shifted or not, read and written where the tokens lie.

Formula: softmax(q k^T / sqrt(D) + mask) v within each window. The grid is rolled by minus the
shift, padded on both sides to whole windows, and cut into them. Where it is shifted, tokens that
the roll made neighbours are told apart by -100 in the mask, as is padding; the two ends of the last
axis stay neighbours, as longitudes are. Without a shift padding is attended to, as its queries,
keys and values say.
The roll, the windows and the mask exist only as indices: nothing is copied, no mask is stored.

Shapes: qkv `[B, C', H', W', 3 * heads * D]` in the order (qkv, head, D), where C', H', W' are C, H,
W rounded up to whole windows, with what is added behind; output `[B, C, H, W, heads * D]`. At most
256 tokens in a window; D a power of two from 16 to 128.
Numerics: products in the dtype of qkv with sums in float32, softmax in float32; probabilities and
their gradients are rounded to the dtype of qkv before products.
Memory: qkv and the output move once; backward moves qkv, dy and dqkv once. Kept: qkv.
Source: Liu et al. 2021 (arXiv 2103.14030); the mask of Bodnar et al. 2024 (arXiv 2405.13063).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels.device import FLOAT_DTYPES, launch, next_power_of_2, runs_triton
from fastft_kernels.dispatch import as_differentiable_op, as_op
from fastft_kernels.window_grid import APART, Grid, Triple, plain_backward
from fastft_kernels.window_grid import reference as reference

MAX_TOKENS = 256
HEAD_COLUMNS = (16, 32, 64, 128)
_LOG2E = tl.constexpr(math.log2(math.e))
_APART = tl.constexpr(APART)


@triton.jit
def _dot(a, b):
    """Float32 operands are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _axis(at, n, before, shift, window):
    """Along an axis: whether a token is in the grid, where it lies, its rolled coordinate."""
    rolled = at - before
    inside = (rolled >= 0) & (rolled < n)
    behind = tl.where(rolled < 0, n + at, at)
    back = rolled + shift
    back = tl.where(back >= n, back - n, back)
    return inside, tl.where(inside, back, behind), rolled


@triton.jit
def _locate(
    t,
    window,
    size,
    padded,
    shift,
    WC: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Of tokens t of a window: row of the input, row of the output, whether it has one, group."""
    C, H, W = size
    CP, HP, WP = padded
    SC, SH, SW = shift
    in_row, in_layer = WP // WW, HP // WH
    w = window % in_row
    h = (window // in_row) % in_layer
    c = window // (in_row * in_layer)
    sample = c // (CP // WC)
    c = c % (CP // WC)
    along_c = _axis(c * WC + t // (WH * WW), C, (CP - C) // 2, SC, WC)
    along_h = _axis(h * WH + (t // WW) % WH, H, (HP - H) // 2, SH, WH)
    along_w = _axis(w * WW + t % WW, W, (WP - W) // 2, SW, WW)
    inside = along_c[0] & along_h[0] & along_w[0]
    row = ((sample * CP + along_c[1]) * HP + along_h[1]).to(tl.int64) * WP + along_w[1]
    out = ((sample * C + along_c[1]) * H + along_h[1]).to(tl.int64) * W + along_w[1]
    group = tl.zeros_like(t)
    if SHIFTED:
        group_c = (along_c[2] >= C - WC).to(tl.int32) + (along_c[2] >= C - SC).to(tl.int32)
        group_h = (along_h[2] >= H - WH).to(tl.int32) + (along_h[2] >= H - SH).to(tl.int32)
        # The ends of the last axis are neighbours.
        group_w = (along_w[2] >= W - WW).to(tl.int32)
        group = tl.where(SC > 0, group_c, 0) * 9 + tl.where(SH > 0, group_h, 0) * 3
        group = tl.where(inside, group + tl.where(SW > 0, group_w, 0), 27)
    return row, out, inside, group


@triton.jit
def _load(POINTER, row, stride, first, valid, D: tl.constexpr):
    """Rows `[tokens, D]`, zero where not valid."""
    at = row[:, None] * stride + first + tl.arange(0, D)[None, :]
    return tl.load(POINTER + at, mask=valid[:, None], other=0.0)


@triton.jit
def _forward_kernel(
    QKV,
    OUT,
    heads,
    scale,
    C,
    H,
    W,
    CP,
    HP,
    WP,
    SC,
    SH,
    SW,
    T: tl.constexpr,
    WC: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFTED: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A window of a head: its keys in a main part and, where T is no power of two, a tail."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    size, padded, shift = (C, H, W), (CP, HP, WP), (SC, SH, SW)
    width = heads * D
    first = head * D
    t1 = tl.arange(0, MAIN)
    place1 = _locate(t1, window, size, padded, shift, WC, WH, WW, SHIFTED)
    k1 = _load(QKV, place1[0], 3 * width, width + first, t1 < T, D)
    v1 = _load(QKV, place1[0], 3 * width, 2 * width + first, t1 < T, D)
    if TAIL:
        t2 = MAIN + tl.arange(0, TAIL)
        place2 = _locate(t2, window, size, padded, shift, WC, WH, WW, SHIFTED)
        k2 = _load(QKV, place2[0], 3 * width, width + first, t2 < T, D)
        v2 = _load(QKV, place2[0], 3 * width, 2 * width + first, t2 < T, D)
    scale *= _LOG2E
    for start in range(0, T, ROWS):
        t = start + tl.arange(0, ROWS)
        place = _locate(t, window, size, padded, shift, WC, WH, WW, SHIFTED)
        q = _load(QKV, place[0], 3 * width, first, t < T, D)
        s1 = _dot(q, tl.trans(k1)) * scale
        if SHIFTED:
            s1 += tl.where(place[3][:, None] == place1[3][None, :], 0.0, _APART * _LOG2E)
        if MAIN > T:
            s1 = tl.where((t1 < T)[None, :], s1, float("-inf"))
        most = tl.max(s1, axis=1)
        if TAIL:
            s2 = _dot(q, tl.trans(k2)) * scale
            if SHIFTED:
                s2 += tl.where(place[3][:, None] == place2[3][None, :], 0.0, _APART * _LOG2E)
            s2 = tl.where((t2 < T)[None, :], s2, float("-inf"))
            most = tl.maximum(most, tl.max(s2, axis=1))
        p1 = tl.exp2(s1 - most[:, None])
        total = tl.sum(p1, axis=1)
        y = _dot(p1.to(q.dtype), v1)
        if TAIL:
            p2 = tl.exp2(s2 - most[:, None])
            total += tl.sum(p2, axis=1)
            y += _dot(p2.to(q.dtype), v2)
        y = (y / total[:, None]).to(OUT.dtype.element_ty)
        at = place[1][:, None] * width + first + tl.arange(0, D)[None, :]
        tl.store(OUT + at, y, mask=((t < T) & place[2])[:, None])


@triton.jit
def _store(POINTER, row, stride, first, value, valid, D: tl.constexpr):
    at = row[:, None] * stride + first + tl.arange(0, D)[None, :]
    tl.store(POINTER + at, value.to(POINTER.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _backward_kernel(
    DY,
    QKV,
    DQKV,
    heads,
    scale,
    C,
    H,
    W,
    CP,
    HP,
    WP,
    SC,
    SH,
    SW,
    T: tl.constexpr,
    WC: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFTED: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """As the forward, with scores as keys by queries; every token's gradients are one program's."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    size, padded, shift = (C, H, W), (CP, HP, WP), (SC, SH, SW)
    width = heads * D
    first = head * D
    t1 = tl.arange(0, MAIN)
    place1 = _locate(t1, window, size, padded, shift, WC, WH, WW, SHIFTED)
    k1 = _load(QKV, place1[0], 3 * width, width + first, t1 < T, D)
    v1 = _load(QKV, place1[0], 3 * width, 2 * width + first, t1 < T, D)
    dk1 = tl.zeros([MAIN, D], tl.float32)
    dv1 = tl.zeros([MAIN, D], tl.float32)
    if TAIL:
        t2 = MAIN + tl.arange(0, TAIL)
        place2 = _locate(t2, window, size, padded, shift, WC, WH, WW, SHIFTED)
        k2 = _load(QKV, place2[0], 3 * width, width + first, t2 < T, D)
        v2 = _load(QKV, place2[0], 3 * width, 2 * width + first, t2 < T, D)
        dk2 = tl.zeros([TAIL, D], tl.float32)
        dv2 = tl.zeros([TAIL, D], tl.float32)
    for start in range(0, T, ROWS):
        t = start + tl.arange(0, ROWS)
        place = _locate(t, window, size, padded, shift, WC, WH, WW, SHIFTED)
        q = _load(QKV, place[0], 3 * width, first, t < T, D)
        dy = _load(DY, place[1], width, first, (t < T) & place[2], D)
        s1 = _dot(k1, tl.trans(q)) * (scale * _LOG2E)
        if SHIFTED:
            s1 += tl.where(place1[3][:, None] == place[3][None, :], 0.0, _APART * _LOG2E)
        if MAIN > T:
            s1 = tl.where((t1 < T)[:, None], s1, float("-inf"))
        most = tl.max(s1, axis=0)
        if TAIL:
            s2 = _dot(k2, tl.trans(q)) * (scale * _LOG2E)
            if SHIFTED:
                s2 += tl.where(place2[3][:, None] == place[3][None, :], 0.0, _APART * _LOG2E)
            s2 = tl.where((t2 < T)[:, None], s2, float("-inf"))
            most = tl.maximum(most, tl.max(s2, axis=0))
        p1 = tl.exp2(s1 - most[None, :])
        total = tl.sum(p1, axis=0)
        if TAIL:
            p2 = tl.exp2(s2 - most[None, :])
            total += tl.sum(p2, axis=0)
            p2 = p2 / total[None, :]
        p1 = p1 / total[None, :]
        dp1 = _dot(v1, tl.trans(dy))
        delta = tl.sum(p1 * dp1, axis=0)
        if TAIL:
            dp2 = _dot(v2, tl.trans(dy))
            delta += tl.sum(p2 * dp2, axis=0)
        dv1 += _dot(p1.to(q.dtype), dy)
        ds1 = (p1 * (dp1 - delta[None, :]) * scale).to(q.dtype)
        dk1 += _dot(ds1, q)
        dq = _dot(tl.trans(ds1), k1)
        if TAIL:
            dv2 += _dot(p2.to(q.dtype), dy)
            ds2 = (p2 * (dp2 - delta[None, :]) * scale).to(q.dtype)
            dk2 += _dot(ds2, q)
            dq += _dot(tl.trans(ds2), k2)
        _store(DQKV, place[0], 3 * width, first, dq, t < T, D)
    _store(DQKV, place1[0], 3 * width, width + first, dk1, t1 < T, D)
    _store(DQKV, place1[0], 3 * width, 2 * width + first, dv1, t1 < T, D)
    if TAIL:
        _store(DQKV, place2[0], 3 * width, width + first, dk2, t2 < T, D)
        _store(DQKV, place2[0], 3 * width, 2 * width + first, dv2, t2 < T, D)


def _parts(tokens: int) -> tuple[int, int]:
    """A window's keys as two powers of two; the second is 0 where one is enough."""
    whole = next_power_of_2(tokens)
    main = whole // 2
    if whole == tokens or main < 16:
        return max(whole, 16), 0
    tail = max(next_power_of_2(tokens - main), 16)
    return (main, tail) if main + tail < whole else (whole, 0)


def _launch(kernel, tensors, qkv: Tensor, heads: int, grid: Grid, rows: int, warps: int) -> None:
    main, tail = _parts(grid.tokens)
    columns = qkv.shape[-1] // 3 // heads
    launch(
        kernel,
        (len(qkv) * grid.windows * heads,),
        qkv.device,
        *tensors,
        *(heads, columns**-0.5, *grid.size, *grid.padded, *grid.shift),
        T=grid.tokens,
        WC=grid.window[0],
        WH=grid.window[1],
        WW=grid.window[2],
        SHIFTED=any(grid.shift),
        D=columns,
        MAIN=main,
        TAIL=tail,
        ROWS=rows,
        num_warps=warps,
    )


def _run_forward(
    qkv: Tensor, heads: int, size: list[int], window: list[int], shift: list[int]
) -> Tensor:
    y = _forward_fake(qkv, heads, size, window, shift)
    if not runs_triton(qkv):
        return y.copy_(reference(qkv, heads, *_triples(size, window, shift)))
    if y.numel():
        qkv = qkv.contiguous()
        _launch(_forward_kernel, (qkv, y), qkv, heads, _grid(size, window, shift), 64, 4)
    return y


def _forward_fake(qkv, heads, size, window, shift):
    return qkv.new_empty((len(qkv), *size, qkv.shape[-1] // 3))


def _triples(*values: list[int]) -> tuple[Triple, ...]:
    return tuple((c, h, w) for c, h, w in values)


def _grid(size: list[int], window: list[int], shift: list[int]) -> Grid:
    return Grid(*_triples(size, window, shift))


def _run_backward(
    dy: Tensor, qkv: Tensor, heads: int, size: list[int], window: list[int], shift: list[int]
) -> Tensor:
    """dqkv."""
    dqkv = _backward_fake(dy, qkv, heads, size, window, shift)
    if not runs_triton(qkv):
        return dqkv.copy_(plain_backward(dy, qkv, heads, *_triples(size, window, shift)))
    if dy.numel():
        dy, qkv = dy.contiguous(), qkv.contiguous()
        tensors = (dy, qkv, dqkv)
        _launch(_backward_kernel, tensors, qkv, heads, _grid(size, window, shift), 32, 4)
    return dqkv


def _backward_fake(dy, qkv, heads, size, window, shift):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_backward = as_op("fastft::window_attention_backward", _run_backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    qkv, *ctx.rest = inputs
    ctx.save_for_backward(qkv)


def _autograd(ctx, dy):
    (qkv,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        # create_graph=True: plain torch, which autograd can differentiate again.
        heads, *triples = ctx.rest
        dqkv = plain_backward(dy, qkv, heads, *_triples(*triples))
    else:
        dqkv = _backward(dy, qkv, *ctx.rest)
    return dqkv, None, None, None, None


_forward = as_differentiable_op(
    "fastft::window_attention_forward", _run_forward, _forward_fake, _setup_context, _autograd
)


def window_attention(
    qkv: Tensor, heads: int, size: Triple, window: Triple, shift: Triple = (0, 0, 0)
) -> Tensor:
    """Attention within the windows of a grid; see above for shapes and order.

    Args:
        size: C, H, W of the grid before padding.
        shift: 0 along an axis that one window covers.

    Raises:
        ValueError: another shape or dtype, a window of more than 256 tokens, a head of other sizes.
    """
    grid = Grid(size, window, shift)
    if qkv.dim() != 5 or tuple(qkv.shape[1:4]) != grid.padded or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"window_attention: qkv must be [B, {', '.join(map(str, grid.padded))}, 3 * heads * D]"
            f" with {heads} heads; got {tuple(qkv.shape)}; pad it behind"
        )
    columns = qkv.shape[-1] // (3 * heads)
    if grid.tokens > MAX_TOKENS or columns not in HEAD_COLUMNS:
        raise ValueError(
            f"window_attention: a window must have at most {MAX_TOKENS} tokens and a head 16, 32,"
            f" 64 or 128 columns; got {grid.tokens} and {columns}; use reference there"
        )
    if qkv.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"window_attention: qkv must be float32, bfloat16 or float16; got {qkv.dtype}; cast it"
        )
    return _forward(qkv, heads, list(size), list(window), list(shift))
