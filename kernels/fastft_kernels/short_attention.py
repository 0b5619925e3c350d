"""Attention of a few queries to a few keys, in very many samples: a Perceiver at every patch.

Formula: softmax(q k^T / sqrt(D)) v for each sample and head. The queries may be the same for all
samples; their gradient is then the sum over the samples.
Attention kernels made for long sequences fill tiles of 64 or 128 tokens with the few there are.

Shapes: q `[S, Lq, heads * D]` or `[1, Lq, heads * D]`, kv `[S, Lk, 2 * heads * D]` in the order (k
or v, head, D), output `[S, Lq, heads * D]`. Lq and Lk at most 64; D a power of two from 16 to 128.
Numerics: products in the dtype of kv with sums in float32, softmax in float32; probabilities and
their gradients are rounded to the dtype of kv before products.
Memory: q, kv and the output move once; backward moves q, kv, dy, dq and dkv once. Kept: q, kv. The
gradient of shared queries goes through a fixed number of float32 rows, the same bits every time.
Source: Jaegle et al. 2021 (arXiv 2103.03206).
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft_kernels.attention_formulas import join_heads, score_gradients, split_heads
from fastft_kernels.device import (
    FLOAT_DTYPES,
    HEAD_COLUMNS,
    launch,
    multiprocessors,
    next_power_of_2,
    runs_triton,
)
from fastft_kernels.dispatch import as_differentiable_op, as_op

MAX_TOKENS = 64
_PROGRAMS_PER_SM = 2
_LOG2E = tl.constexpr(math.log2(math.e))


def reference(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """The formula in plain torch."""
    q, k, v = _by_head(q, kv, heads)
    found = F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v)
    return join_heads(found)


def plain_backward(dy: Tensor, q: Tensor, kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(dq, dkv), computed in float32 at least; autograd can differentiate them."""
    wide = torch.promote_types(kv.dtype, torch.float32)
    by_head, k, v = _by_head(q.to(wide), kv.to(wide), heads)
    dy = split_heads(dy.to(wide), heads)
    scale = k.shape[-1] ** -0.5
    p, ds = score_gradients(dy, by_head, k, v, scale, None)
    ds = ds * scale
    dq, dk, dv = map(join_heads, (ds @ k, ds.mT @ by_head, p.mT @ dy))
    return dq.sum_to_size(q.shape).to(q.dtype), torch.cat([dk, dv], dim=2).to(kv.dtype)


def _by_head(q: Tensor, kv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as `[S, heads, L, D]`."""
    k, v = kv.chunk(2, dim=2)
    return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)


@triton.jit
def _dot(a, b):
    """Float32 operands are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _rows(POINTER, start, token, stride, first, valid, D: tl.constexpr):
    """`[tokens, D]` of a sample's head, zero where there is no token."""
    at = start + token[:, None] * stride + first + tl.arange(0, D)[None, :]
    return tl.load(POINTER + at, mask=valid[:, None], other=0.0)


@triton.jit
def _put(POINTER, start, token, stride, first, value, valid, D: tl.constexpr):
    at = start + token[:, None] * stride + first + tl.arange(0, D)[None, :]
    tl.store(POINTER + at, value.to(POINTER.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _probabilities(q, k, is_key, scale):
    scores = _dot(q, tl.trans(k)) * (scale * _LOG2E)
    scores = tl.where(is_key[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def _forward_kernel(
    Q,
    KV,
    OUT,
    samples,
    heads,
    scale,
    LQ: tl.constexpr,
    LK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Every so many samples of a head; queries of the first where they are shared."""
    head = tl.program_id(0) % heads
    first, width = head * D, heads * D
    tq, tk = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    is_query, is_key = tq < LQ, tk < LK
    if SHARED:
        q = _rows(Q, 0, tq, width, first, is_query, D)
    for sample in range(tl.program_id(0) // heads, samples, tl.num_programs(0) // heads):
        start = tl.full([], sample, tl.int64) * width
        if not SHARED:
            q = _rows(Q, start * LQ, tq, width, first, is_query, D)
        k = _rows(KV, start * 2 * LK, tk, 2 * width, first, is_key, D)
        v = _rows(KV, start * 2 * LK, tk, 2 * width, width + first, is_key, D)
        p = _probabilities(q, k, is_key, scale)
        _put(OUT, start * LQ, tq, width, first, _dot(p.to(v.dtype), v), is_query, D)


@triton.jit
def _backward_kernel(
    DY,
    Q,
    KV,
    DQ,
    DKV,
    samples,
    heads,
    scale,
    LQ: tl.constexpr,
    LK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARED: tl.constexpr,
):
    """As the forward; DQ has a float32 row for each of a head's programs where q is shared."""
    head = tl.program_id(0) % heads
    first, width = head * D, heads * D
    tq, tk = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    is_query, is_key = tq < LQ, tk < LK
    total = tl.zeros([BLOCK_Q, D], tl.float32)
    if SHARED:
        q = _rows(Q, 0, tq, width, first, is_query, D)
    program = tl.program_id(0) // heads
    for sample in range(program, samples, tl.num_programs(0) // heads):
        start = tl.full([], sample, tl.int64) * width
        if not SHARED:
            q = _rows(Q, start * LQ, tq, width, first, is_query, D)
        k = _rows(KV, start * 2 * LK, tk, 2 * width, first, is_key, D)
        v = _rows(KV, start * 2 * LK, tk, 2 * width, width + first, is_key, D)
        dy = _rows(DY, start * LQ, tq, width, first, is_query, D)
        p = _probabilities(q, k, is_key, scale)
        dp = _dot(dy, tl.trans(v))
        ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale
        ds = ds.to(q.dtype)
        dk = _dot(tl.trans(ds), q)
        dv = _dot(tl.trans(p.to(q.dtype)), dy)
        _put(DKV, start * 2 * LK, tk, 2 * width, first, dk, is_key, D)
        _put(DKV, start * 2 * LK, tk, 2 * width, width + first, dv, is_key, D)
        dq = _dot(ds, k)
        if SHARED:
            total += dq
        else:
            _put(DQ, start * LQ, tq, width, first, dq, is_query, D)
    if SHARED:
        _put(DQ, program.to(tl.int64) * LQ * width, tq, width, first, total, is_query, D)


def _launch(
    kernel, tensors, q: Tensor, kv: Tensor, heads: int, programs: int, products: int
) -> None:
    """The kernel's programs; each computes so many matrix products for a sample's head."""
    columns = kv.shape[2] // 2 // heads
    launch(
        kernel,
        (programs * heads,),
        kv.device,
        *tensors,
        *(len(kv), heads, columns**-0.5),
        LQ=q.shape[1],
        LK=kv.shape[1],
        D=columns,
        BLOCK_Q=max(16, next_power_of_2(q.shape[1])),
        BLOCK_K=max(16, next_power_of_2(kv.shape[1])),
        SHARED=len(q) == 1,
        num_warps=1,
        flops=products * _product_flops(q.shape, kv.shape),
    )


def _programs(kv: Tensor) -> int:
    """Of each head."""
    return min(len(kv), _PROGRAMS_PER_SM * multiprocessors(kv.device))


def _run_forward(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    y = _forward_fake(q, kv, heads)
    if not runs_triton(kv):
        return y.copy_(reference(q, kv, heads))
    if y.numel():
        q, kv = q.contiguous(), kv.contiguous()
        _launch(_forward_kernel, (q, kv, y), q, kv, heads, _programs(kv), products=2)
    return y


def _forward_fake(q, kv, heads):
    return kv.new_empty((len(kv), *q.shape[1:]))


def _run_backward(dy: Tensor, q: Tensor, kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(dq, dkv)."""
    dq, dkv = _backward_fake(dy, q, kv, heads)
    if not runs_triton(kv):
        for kept, value in zip((dq, dkv), plain_backward(dy, q, kv, heads), strict=True):
            kept.copy_(value)
        return dq, dkv
    if not dy.numel():
        return dq.zero_(), dkv.zero_()
    dy, q, kv = dy.contiguous(), q.contiguous(), kv.contiguous()
    programs = _programs(kv)
    shared = len(q) == 1
    found = q.new_empty((programs, *q.shape[1:]), dtype=torch.float32) if shared else dq
    _launch(_backward_kernel, (dy, q, kv, found, dkv), q, kv, heads, programs, products=5)
    return dq.copy_(found.sum(0)) if shared else dq, dkv


def _backward_fake(dy, q, kv, heads):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


_backward = as_op("fastft::short_attention_backward", _run_backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    q, kv, ctx.heads = inputs
    ctx.save_for_backward(q, kv)


def _autograd(ctx, dy):
    q, kv = ctx.saved_tensors
    # create_graph=True: plain torch, which autograd can differentiate again.
    backward = plain_backward if torch.is_grad_enabled() else _backward
    dq, dkv = backward(dy, q, kv, ctx.heads)
    return dq, dkv, None


_forward = as_differentiable_op(
    "fastft::short_attention_forward", _run_forward, _forward_fake, _setup_context, _autograd
)


@register_flop_formula(torch.ops.fastft.short_attention_forward)
def _forward_flops(q_shape, kv_shape, heads, *_, **__) -> int:
    """Two products; without it a partitioner thinks the op free to recompute."""
    return 2 * _product_flops(q_shape, kv_shape)


@register_flop_formula(torch.ops.fastft.short_attention_backward)
def _backward_flops(dy_shape, q_shape, kv_shape, heads, *_, **__) -> int:
    return 5 * _product_flops(q_shape, kv_shape)


def _product_flops(q_shape, kv_shape) -> int:
    return math.prod(kv_shape) * q_shape[1]


def short_attention(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """Attention of few queries to few keys; see above for shapes and order.

    Raises:
        ValueError: another shape or dtype, more than 64 tokens, a head of other sizes.
    """
    fits = q.dim() == kv.dim() == 3 and len(q) in (1, len(kv)) and 2 * q.shape[2] == kv.shape[2]
    if not fits or q.shape[2] % heads:
        raise ValueError(
            f"short_attention: q must be [S or 1, Lq, heads * D] for kv [S, Lk, 2 * heads * D]"
            f" with {heads} heads; got {tuple(q.shape)} and {tuple(kv.shape)}; reshape them"
        )
    columns = q.shape[2] // heads
    if max(q.shape[1], kv.shape[1]) > MAX_TOKENS or columns not in HEAD_COLUMNS:
        raise ValueError(
            f"short_attention: at most {MAX_TOKENS} queries and keys, and heads of 16, 32, 64 or"
            f" 128 columns; got {q.shape[1]}, {kv.shape[1]} and {columns}; use torch's attention"
        )
    if kv.dtype not in FLOAT_DTYPES or q.dtype != kv.dtype:
        raise ValueError(
            "short_attention: q and kv must both be float32, bfloat16 or float16; got"
            f" {q.dtype} and {kv.dtype}; cast them"
        )
    return _forward(q, kv, heads)
