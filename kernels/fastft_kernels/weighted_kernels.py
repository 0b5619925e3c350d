"""The kernels of `weighted_attention`: a head of a sample for each program, scores in registers."""

import math

import triton
import triton.language as tl

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(POINTER, sample, stride, first, t, T: tl.constexpr, D: tl.constexpr):
    """Tokens `[BLOCK, D]` of a head, zero where there is none."""
    at = (sample * T + t[:, None]) * stride + first + tl.arange(0, D)[None, :]
    return tl.load(POINTER + at, mask=(t < T)[:, None], other=0.0)


@triton.jit
def _store(POINTER, sample, stride, first, t, value, T: tl.constexpr, D: tl.constexpr):
    at = (sample * T + t[:, None]) * stride + first + tl.arange(0, D)[None, :]
    tl.store(POINTER + at, value, mask=(t < T)[:, None])


@triton.jit
def _queries_and_keys(QKV, heads, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sample and head, columns of a token, its tokens, queries and keys."""
    head = tl.program_id(0) % heads
    sample = (tl.program_id(0) // heads).to(tl.int64)
    width = heads * D
    t = tl.arange(0, BLOCK)
    q = _load(QKV, sample, 3 * width, head * D, t, T, D)
    k = _load(QKV, sample, 3 * width, width + head * D, t, T, D)
    return sample, head, width, t, q, k


@triton.jit
def _probabilities(q, k, log_weight, scale, PRECISION: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + log_weight[None, :]
    s *= _LOG2E
    p = tl.exp2(s - tl.max(s, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def forward(
    QKV,
    WEIGHT,
    OUT,
    heads,
    scale,
    T: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O."""
    sample, head, width, t, q, k = _queries_and_keys(QKV, heads, T, D, BLOCK)  # pyright: ignore
    v = _load(QKV, sample, 3 * width, 2 * width + head * D, t, T, D)
    weight = tl.load(WEIGHT + sample * T + t, mask=t < T, other=float("-inf"))
    p = _probabilities(q, k, weight, scale, PRECISION)
    y = tl.dot(p, v, input_precision=PRECISION)
    _store(OUT, sample, width, head * D, t, y, T, D)


@triton.jit
def backward(
    DY,
    QKV,
    WEIGHT,
    DQKV,
    DWEIGHT,
    heads,
    scale,
    T: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ, dK, dV, and db of each head."""
    sample, head, width, t, q, k = _queries_and_keys(QKV, heads, T, D, BLOCK)  # pyright: ignore
    v = _load(QKV, sample, 3 * width, 2 * width + head * D, t, T, D)
    dy = _load(DY, sample, width, head * D, t, T, D)
    weight = tl.load(WEIGHT + sample * T + t, mask=t < T, other=float("-inf"))
    p = _probabilities(q, k, weight, scale, PRECISION)
    dv = tl.dot(tl.trans(p), dy, input_precision=PRECISION)
    _store(DQKV, sample, 3 * width, 2 * width + head * D, t, dv, T, D)
    dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
    dq = tl.dot(ds, k, input_precision=PRECISION) * scale
    _store(DQKV, sample, 3 * width, head * D, t, dq, T, D)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
    _store(DQKV, sample, 3 * width, width + head * D, t, dk, T, D)
    at = tl.program_id(0).to(tl.int64) * T + t
    tl.store(DWEIGHT + at, tl.sum(ds, axis=0), mask=t < T)


@triton.jit
def double_backward(
    GQKV,
    GWEIGHT,
    DY,
    QKV,
    WEIGHT,
    OF_DY,
    OF_QKV,
    OF_WEIGHT,
    heads,
    scale,
    T: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of dO, of Q, K, V, and of b of each head; letters as in `weighted_attention`.

    Of a query that is not there dO, gQ and Q are zero, and so are its rows of dS, G and H.
    """
    sample, head, width, t, q, k = _queries_and_keys(QKV, heads, T, D, BLOCK)  # pyright: ignore
    weight = tl.load(WEIGHT + sample * T + t, mask=t < T, other=float("-inf"))
    p = _probabilities(q, k, weight, scale, PRECISION)
    gq = _load(GQKV, sample, 3 * width, head * D, t, T, D)
    gk = _load(GQKV, sample, 3 * width, width + head * D, t, T, D)
    a = tl.dot(gq, tl.trans(k), input_precision=PRECISION)
    a = tl.dot(q, tl.trans(gk), a, input_precision=PRECISION) * scale
    a += tl.load(GWEIGHT + sample * T + t, mask=t < T, other=0.0)[None, :]
    centred = a - tl.sum(p * a, axis=1)[:, None]
    e = p * centred
    v = _load(QKV, sample, 3 * width, 2 * width + head * D, t, T, D)
    gv = _load(GQKV, sample, 3 * width, 2 * width + head * D, t, T, D)
    dy = _load(DY, sample, width, head * D, t, T, D)
    of_dy = tl.dot(e, v, input_precision=PRECISION)
    of_dy = tl.dot(p, gv, of_dy, input_precision=PRECISION)
    _store(OF_DY, sample, width, head * D, t, of_dy, T, D)
    of_v = tl.dot(tl.trans(e), dy, input_precision=PRECISION)
    _store(OF_QKV, sample, 3 * width, 2 * width + head * D, t, of_v, T, D)
    dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
    delta = tl.sum(p * dp, axis=1)[:, None]
    g = dp * centred - delta * a
    g = tl.dot(dy, tl.trans(gv), g, input_precision=PRECISION)
    h = p * (g - tl.sum(p * g, axis=1)[:, None])
    ds = p * (dp - delta)
    of_q = tl.dot(ds, gk, input_precision=PRECISION)
    of_q = tl.dot(h, k, of_q, input_precision=PRECISION) * scale
    _store(OF_QKV, sample, 3 * width, head * D, t, of_q, T, D)
    of_k = tl.dot(tl.trans(ds), gq, input_precision=PRECISION)
    of_k = tl.dot(tl.trans(h), q, of_k, input_precision=PRECISION) * scale
    _store(OF_QKV, sample, 3 * width, width + head * D, t, of_k, T, D)
    at = tl.program_id(0).to(tl.int64) * T + t
    tl.store(OF_WEIGHT + at, tl.sum(h, axis=0), mask=t < T)
