"""Attention over keys with weights, differentiable twice: energies, forces, and a loss on both.

Formula, for each sample and head: P = softmax(S), S = scale Q K^T + b with b = log weight of each
key, O = P V. Backward, with dP = dO V^T and delta the sums of P dP over keys: dS = P (dP - delta),
dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, db = sums of dS over queries.
Backward of that, for gradients gQ, gK, gV, gb of its outputs: A = scale (gQ K^T + Q gK^T) + gb,
a = sums of P A over keys, E = P (A - a), C = dO gV^T, G = dP (A - a) - delta A + C,
H = P (G - sums of P G over keys); gradients are E V + P gV of dO, scale (dS gK + H K) of Q,
scale (dS^T gQ + H^T Q) of K, E^T dO of V, sums of H over queries of b.
None of the matrices of scores exists in memory; a third derivative is not there.

Shapes: qkv `[S, T, 3 * heads * D]` in the order (qkv, head, D), log_weights `[S, T]`, output
`[S, T, heads * D]`. T at most 64; D a power of two from 16 to 128.
Numerics: products of float32 in full precision, or in TF32 where torch's are; sums and softmax in
float32. Other precisions, and other devices, take the formulas above in plain torch.
Memory: forward moves qkv and O once, backward qkv, dO and dqkv, its backward those, their gradients
and the results. Kept: qkv and log_weights, and by backward dO too.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft_kernels.attention_formulas import join_heads, score_gradients, split_heads
from fastft_kernels.device import HEAD_COLUMNS, launch, next_power_of_2, runs_triton
from fastft_kernels.dispatch import as_differentiable_op, as_op
from fastft_kernels.weighted_kernels import backward, double_backward, forward

MAX_TOKENS = 64


def reference(qkv: Tensor, log_weights: Tensor, heads: int, scale: float) -> Tensor:
    """The formula in plain torch."""
    q, k, v = split_heads(qkv, 3 * heads).chunk(3, dim=1)
    scores = scale * (q @ k.mT) + log_weights[:, None, None, :].to(q.dtype)
    return join_heads(scores.softmax(-1) @ v)


def plain_backward(
    dy: Tensor, qkv: Tensor, log_weights: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(dqkv, dlog_weights)."""
    q, k, v = split_heads(qkv, 3 * heads).chunk(3, dim=1)
    dy = split_heads(dy, heads)
    bias = log_weights[:, None, None, :].to(q.dtype)
    p, ds = score_gradients(dy, q, k, v, scale, bias)
    found = torch.cat([scale * (ds @ k), scale * (ds.mT @ q), p.mT @ dy], dim=1)
    return join_heads(found), ds.sum((1, 2))


def plain_double_backward(
    gqkv: Tensor,
    gweights: Tensor,
    dy: Tensor,
    qkv: Tensor,
    log_weights: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dy, qkv and log_weights."""
    q, k, v = split_heads(qkv, 3 * heads).chunk(3, dim=1)
    gq, gk, gv = split_heads(gqkv, 3 * heads).chunk(3, dim=1)
    dy = split_heads(dy, heads)
    p = (scale * (q @ k.mT) + log_weights[:, None, None, :].to(q.dtype)).softmax(-1)
    dp = dy @ v.mT
    delta = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    a = scale * (gq @ k.mT + q @ gk.mT) + gweights[:, None, None, :].to(q.dtype)
    centred = a - (p * a).sum(-1, keepdim=True)
    e = p * centred
    g = dp * centred - delta * a + dy @ gv.mT
    h = p * (g - (p * g).sum(-1, keepdim=True))
    found = [scale * (ds @ gk + h @ k), scale * (ds.mT @ gq + h.mT @ q), e.mT @ dy]
    return join_heads(e @ v + p @ gv), join_heads(torch.cat(found, dim=1)), h.sum((1, 2))


def _takes(qkv: Tensor) -> bool:
    """Whether the kernels run; elsewhere plain torch does."""
    return runs_triton(qkv) and qkv.dtype is torch.float32


def _launch(
    kernel, tensors, qkv: Tensor, heads: int, scale: float, products: int, warps: int = 4
) -> None:
    """A program for each head of each sample, which computes so many matrix products."""
    samples, tokens, width = qkv.shape
    launch(
        kernel,
        (samples * heads,),
        qkv.device,
        *tensors,
        *(heads, scale),
        T=tokens,
        D=width // 3 // heads,
        BLOCK=max(16, next_power_of_2(tokens)),
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        num_warps=warps,
        flops=products * _product_flops(qkv.shape),
    )


def _run_forward(qkv: Tensor, log_weights: Tensor, heads: int, scale: float) -> Tensor:
    y = _forward_fake(qkv, log_weights, heads, scale)
    if not _takes(qkv):
        return y.copy_(reference(qkv, log_weights, heads, scale))
    if y.numel():
        qkv, log_weights = qkv.contiguous(), log_weights.float().contiguous()
        _launch(forward, (qkv, log_weights, y), qkv, heads, scale, products=2)
    return y


def _forward_fake(qkv, log_weights, heads, scale):
    samples, tokens, width = qkv.shape
    return qkv.new_empty((samples, tokens, width // 3))


def _run_backward(
    dy: Tensor, qkv: Tensor, log_weights: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(dqkv, dlog_weights)."""
    dqkv, dweights = _backward_fake(dy, qkv, log_weights, heads, scale)
    if not _takes(qkv):
        found = plain_backward(dy, qkv, log_weights, heads, scale)
        return dqkv.copy_(found[0]), dweights.copy_(found[1])
    if dy.numel():
        dy, qkv, weights = dy.contiguous(), qkv.contiguous(), log_weights.float().contiguous()
        by_head = qkv.new_empty((len(qkv), heads, qkv.shape[1]))
        tensors = (dy, qkv, weights, dqkv, by_head)
        _launch(backward, tensors, qkv, heads, scale, products=5)
        dweights.copy_(by_head.sum(1))
    return dqkv, dweights


def _backward_fake(dy, qkv, log_weights, heads, scale):
    return qkv.new_empty(qkv.shape), log_weights.new_empty(log_weights.shape)


def _run_double_backward(
    gqkv: Tensor,
    gweights: Tensor,
    dy: Tensor,
    qkv: Tensor,
    log_weights: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dy, qkv and log_weights."""
    out = _double_backward_fake(gqkv, gweights, dy, qkv, log_weights, heads, scale)
    gdy, gx, gb = out
    if not _takes(qkv):
        found = plain_double_backward(gqkv, gweights, dy, qkv, log_weights, heads, scale)
        return gdy.copy_(found[0]), gx.copy_(found[1]), gb.copy_(found[2])
    if dy.numel():
        inputs = [x.float().contiguous() for x in (gqkv, gweights, dy, qkv, log_weights)]
        by_head = qkv.new_empty((len(qkv), heads, qkv.shape[1]))
        tensors = (*inputs, gdy, gx, by_head)
        _launch(double_backward, tensors, inputs[3], heads, scale, products=12, warps=8)
        gb.copy_(by_head.sum(1))
    return out


def _double_backward_fake(gqkv, gweights, dy, qkv, log_weights, heads, scale):
    gdy, gx = qkv.new_empty(dy.shape), qkv.new_empty(qkv.shape)
    return gdy, gx, log_weights.new_empty(log_weights.shape)


_double_backward = as_op(
    "fastft::weighted_attention_double_backward", _run_double_backward, _double_backward_fake
)


def _setup_backward(ctx, inputs, output) -> None:
    dy, qkv, log_weights, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(dy, qkv, log_weights)


def _differentiate_backward(ctx, gqkv, gweights):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "weighted_attention: third derivatives are not there; differentiate twice at most"
        )
    found = _double_backward(gqkv, gweights, *ctx.saved_tensors, ctx.heads, ctx.scale)
    return *found, None, None


_backward = as_differentiable_op(
    "fastft::weighted_attention_backward",
    _run_backward,
    _backward_fake,
    _setup_backward,
    _differentiate_backward,
)


def _setup_forward(ctx, inputs, output) -> None:
    qkv, log_weights, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(qkv, log_weights)


def _differentiate_forward(ctx, dy):
    found = _backward(dy, *ctx.saved_tensors, ctx.heads, ctx.scale)
    return *found, None, None


_forward = as_differentiable_op(
    "fastft::weighted_attention_forward",
    _run_forward,
    _forward_fake,
    _setup_forward,
    _differentiate_forward,
)


@register_flop_formula(torch.ops.fastft.weighted_attention_forward)
def _forward_flops(qkv_shape, *_, **__) -> int:
    """Two products; without it a partitioner thinks the op free to recompute."""
    return 2 * _product_flops(qkv_shape)


@register_flop_formula(torch.ops.fastft.weighted_attention_backward)
def _backward_flops(dy_shape, qkv_shape, *_, **__) -> int:
    return 5 * _product_flops(qkv_shape)


@register_flop_formula(torch.ops.fastft.weighted_attention_double_backward)
def _double_backward_flops(gqkv_shape, *_, **__) -> int:
    return 12 * _product_flops(gqkv_shape)


def _product_flops(qkv_shape) -> int:
    return 2 * math.prod(qkv_shape) // 3 * qkv_shape[1]


def weighted_attention(qkv: Tensor, log_weights: Tensor, heads: int, scale: float) -> Tensor:
    """Attention over keys with weights; see above for shapes and order.

    Args:
        log_weights: -inf leaves a key out; a sample needs one that is in.
        scale: of the scores, as 1 / sqrt(D).

    Raises:
        ValueError: another shape, more than 64 tokens, a head of other sizes.
    """
    if qkv.dim() != 3 or qkv.shape[2] % (3 * heads) or log_weights.shape != qkv.shape[:2]:
        raise ValueError(
            f"weighted_attention: qkv must be [S, T, 3 * heads * D] with {heads} heads, log_weights"
            f" [S, T]; got {tuple(qkv.shape)} and {tuple(log_weights.shape)}; reshape them"
        )
    columns = qkv.shape[2] // (3 * heads)
    if qkv.shape[1] > MAX_TOKENS or columns not in HEAD_COLUMNS:
        raise ValueError(
            f"weighted_attention: at most {MAX_TOKENS} tokens, and heads of 16, 32, 64 or 128"
            f" columns; got {qkv.shape[1]} and {columns}; use plain torch there"
        )
    return _forward(qkv, log_weights, heads, scale)
