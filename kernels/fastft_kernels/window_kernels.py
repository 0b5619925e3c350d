"""The kernels of `window_attention`: a window of a head for each program, or some of its keys."""

import math

import triton
import triton.language as tl

from fastft_kernels.window_grid import APART

_LOG2E = tl.constexpr(math.log2(math.e))
_APART = tl.constexpr(APART)
# Gradients of scores are often too small for float16; products take them this much larger.
_LIFT = tl.constexpr(16.0)


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
    WRAPS: tl.constexpr,
    PADDED: tl.constexpr,
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
    if SHIFTED and PADDED:
        group_c = (along_c[2] >= C - WC).to(tl.int32) + (along_c[2] >= C - SC).to(tl.int32)
        group_h = (along_h[2] >= H - WH).to(tl.int32) + (along_h[2] >= H - SH).to(tl.int32)
        group_w = (along_w[2] >= W - WW).to(tl.int32)
        if not WRAPS:
            group_w += (along_w[2] >= W - SW).to(tl.int32)
        group = tl.where(SC > 0, group_c, 0) * 9 + tl.where(SH > 0, group_h, 0) * 3
        group = tl.where(inside, group + tl.where(SW > 0, group_w, 0), 27)
    elif SHIFTED:
        # Only a last window has tokens from both ends, and always at the same places, so that
        # whether a token is there is computed once for all windows.
        group = (t // (WH * WW) >= WC - SC).to(tl.int32) + ((t // WW) % WH >= WH - SH) * 2
        last = (c == CP // WC - 1).to(tl.int32) + (h == in_layer - 1) * 2
        if not WRAPS:
            group += (t % WW >= WW - SW) * 4
            last += (w == in_row - 1) * 4
        group = group & last
    return row, out, inside, group


@triton.jit
def _load(POINTER, row, stride, first, valid, D: tl.constexpr):
    """Rows `[tokens, D]`, zero where not valid."""
    at = row[:, None] * stride + first + tl.arange(0, D)[None, :]
    return tl.load(POINTER + at, mask=valid[:, None], other=0.0)


@triton.jit
def _scores(a, b, scale, group_a, group_b, is_b, SHIFTED: tl.constexpr, PARTIAL: tl.constexpr):
    """Times log2(e); -inf where there is no b."""
    s = _dot(a, tl.trans(b)) * (scale * _LOG2E)
    if SHIFTED:
        s += tl.where(group_a[:, None] == group_b[None, :], 0.0, _APART * _LOG2E)
    if PARTIAL:
        s = tl.where(is_b[None, :], s, float("-inf"))
    return s


@triton.jit
def _bias(BIAS, head, t, key, T: tl.constexpr):
    """Of a head, times log2(e); zero where there is no token."""
    there = (t < T)[:, None] & (key < T)[None, :]
    at = head * T * T + t[:, None] * T + key[None, :]
    return tl.load(BIAS + at, mask=there, other=0.0).to(tl.float32) * _LOG2E


@triton.jit
def forward(
    QKV,
    BIAS,
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
    WRAPS: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A window of a head: its keys in a main part and, where T is no power of two, a tail."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    size, padded, shift = (C, H, W), (CP, HP, WP), (SC, SH, SW)
    width = heads * D
    first = head * D
    t1 = tl.arange(0, MAIN)
    place1 = _locate(t1, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
    k1 = _load(QKV, place1[0], 3 * width, width + first, t1 < T, D)
    v1 = _load(QKV, place1[0], 3 * width, 2 * width + first, t1 < T, D)
    if TAIL:
        t2 = MAIN + tl.arange(0, TAIL)
        place2 = _locate(t2, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
        k2 = _load(QKV, place2[0], 3 * width, width + first, t2 < T, D)
        v2 = _load(QKV, place2[0], 3 * width, 2 * width + first, t2 < T, D)
    for start in range(0, T, ROWS):
        t = start + tl.arange(0, ROWS)
        place = _locate(t, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
        q = _load(QKV, place[0], 3 * width, first, t < T, D)
        s1 = _scores(q, k1, scale, place[3], place1[3], (t1 < T), SHIFTED, MAIN > T)
        if HAS_BIAS:
            s1 += _bias(BIAS, head, t, t1, T)
        most = tl.max(s1, axis=1)
        if TAIL:
            s2 = _scores(q, k2, scale, place[3], place2[3], (t2 < T), SHIFTED, True)
            if HAS_BIAS:
                s2 += _bias(BIAS, head, t, t2, T)
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
def queries_backward(
    DY,
    QKV,
    DQKV,
    STATISTICS,
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
    WRAPS: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dq, and of each query what the keys' gradients need: log2 of the sum of the exponentials, and
    the sum of p times dp."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    size, padded, shift = (C, H, W), (CP, HP, WP), (SC, SH, SW)
    width = heads * D
    first = head * D
    t1 = tl.arange(0, MAIN)
    place1 = _locate(t1, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
    k1 = _load(QKV, place1[0], 3 * width, width + first, t1 < T, D)
    v1 = _load(QKV, place1[0], 3 * width, 2 * width + first, t1 < T, D)
    if TAIL:
        t2 = MAIN + tl.arange(0, TAIL)
        place2 = _locate(t2, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
        k2 = _load(QKV, place2[0], 3 * width, width + first, t2 < T, D)
        v2 = _load(QKV, place2[0], 3 * width, 2 * width + first, t2 < T, D)
    for start in range(0, T, ROWS):
        t = start + tl.arange(0, ROWS)
        place = _locate(t, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
        q = _load(QKV, place[0], 3 * width, first, t < T, D)
        dy = _load(DY, place[1], width, first, (t < T) & place[2], D)
        s1 = _scores(q, k1, scale, place[3], place1[3], (t1 < T), SHIFTED, MAIN > T)
        most = tl.max(s1, axis=1)
        if TAIL:
            s2 = _scores(q, k2, scale, place[3], place2[3], (t2 < T), SHIFTED, True)
            most = tl.maximum(most, tl.max(s2, axis=1))
        p1 = tl.exp2(s1 - most[:, None])
        total = tl.sum(p1, axis=1)
        dp1 = _dot(dy, tl.trans(v1))
        delta = tl.sum(p1 * dp1, axis=1)
        if TAIL:
            p2 = tl.exp2(s2 - most[:, None])
            total += tl.sum(p2, axis=1)
            dp2 = _dot(dy, tl.trans(v2))
            delta += tl.sum(p2 * dp2, axis=1)
        delta = delta / total
        # What is the same for a row is taken after the product: exponentials, not probabilities,
        # keep its operand above what float16 can hold.
        dq = _dot((p1 * (dp1 - delta[:, None])).to(q.dtype), k1)
        if TAIL:
            dq += _dot((p2 * (dp2 - delta[:, None])).to(q.dtype), k2)
        dq *= (scale / total)[:, None]
        _store(DQKV, place[0], 3 * width, first, dq, t < T, D)
        at = STATISTICS + (tl.program_id(0).to(tl.int64) * T + t) * 2
        tl.store(at, most + tl.log2(total), mask=t < T)
        tl.store(at + 1, delta, mask=t < T)


@triton.jit
def keys_backward(
    DY,
    QKV,
    DQKV,
    STATISTICS,
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
    WRAPS: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dk and dv of some keys of a window."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    size, padded, shift = (C, H, W), (CP, HP, WP), (SC, SH, SW)
    width = heads * D
    first = head * D
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    place = _locate(key, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
    k = _load(QKV, place[0], 3 * width, width + first, key < T, D)
    v = _load(QKV, place[0], 3 * width, 2 * width + first, key < T, D)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    for start in range(0, T, ROWS):
        t = start + tl.arange(0, ROWS)
        of = _locate(t, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
        q = _load(QKV, of[0], 3 * width, first, t < T, D)
        dy = _load(DY, of[1], width, first, (t < T) & of[2], D)
        at = STATISTICS + (tl.program_id(0).to(tl.int64) * T + t) * 2
        level = tl.load(at, mask=t < T, other=float("inf"))
        delta = tl.load(at + 1, mask=t < T, other=0.0)
        s = _scores(k, q, scale, place[3], of[3], (t < T), SHIFTED, False)
        p = tl.exp2(s - level[None, :])
        dv += _dot(p.to(q.dtype), dy)
        dp = _dot(v, tl.trans(dy))
        dk += _dot((p * (dp - delta[None, :]) * _LIFT).to(q.dtype), q)
    _store(DQKV, place[0], 3 * width, width + first, dk * (scale / _LIFT), key < T, D)
    _store(DQKV, place[0], 3 * width, 2 * width + first, dv, key < T, D)


@triton.jit
def small_backward(
    DY,
    QKV,
    BIAS,
    DQKV,
    DBIAS,
    windows,
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
    WRAPS: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """dq, dk and dv of every so many windows of a head, each whole, and their part of dbias."""
    head = tl.program_id(0)
    size, padded, shift = (C, H, W), (CP, HP, WP), (SC, SH, SW)
    width = heads * D
    first = head * D
    t = tl.arange(0, BLOCK)
    dbias = tl.zeros([BLOCK, BLOCK], tl.float32)
    if HAS_BIAS:
        bias = _bias(BIAS, head, t, t, T)
    for window in range(tl.program_id(1), windows, tl.num_programs(1)):
        place = _locate(t, window, size, padded, shift, WC, WH, WW, SHIFTED, WRAPS, PADDED)
        q = _load(QKV, place[0], 3 * width, first, t < T, D)
        k = _load(QKV, place[0], 3 * width, width + first, t < T, D)
        v = _load(QKV, place[0], 3 * width, 2 * width + first, t < T, D)
        dy = _load(DY, place[1], width, first, (t < T) & place[2], D)
        s = _scores(q, k, scale, place[3], place[3], (t < T), SHIFTED, BLOCK > T)
        if HAS_BIAS:
            s += bias
        p = tl.exp2(s - tl.max(s, axis=1)[:, None])
        p = p / tl.sum(p, axis=1)[:, None]
        dv = _dot(tl.trans(p.to(q.dtype)), dy)
        _store(DQKV, place[0], 3 * width, 2 * width + first, dv, t < T, D)
        dp = _dot(dy, tl.trans(v))
        ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
        if HAS_BIAS:
            dbias += ds
        ds = (ds * _LIFT).to(q.dtype)
        dq = _dot(ds, k) * (scale / _LIFT)
        _store(DQKV, place[0], 3 * width, first, dq, t < T, D)
        dk = _dot(tl.trans(ds), q) * (scale / _LIFT)
        _store(DQKV, place[0], 3 * width, width + first, dk, t < T, D)
    if HAS_BIAS:
        row = (tl.program_id(1).to(tl.int64) * heads + head) * T + t
        at = row[:, None] * T + t[None, :]
        tl.store(DBIAS + at, dbias, mask=(t < T)[:, None] & (t < T)[None, :])
