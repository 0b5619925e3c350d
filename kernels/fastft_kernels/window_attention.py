"""Attention within windows of a 3D grid, shifted or not, read and written where the tokens lie.

Formula: softmax(q k^T / sqrt(D) + bias + mask) v within each window. The grid is rolled by minus
the shift, padded on both sides to whole windows, and cut into them. Where it is shifted, tokens
that the roll made neighbours are told apart by -100 in the mask, as is padding; the two ends of the
last axis stay neighbours where it wraps, as longitudes do. Without a shift padding is attended to,
as its queries, keys and values say. The bias, if any, is the same for all windows.
The roll, the windows and the mask exist only as indices: nothing is copied, no mask is stored.

Shapes: qkv `[B, C', H', W', 3 * heads * D]` in the order (qkv, head, D), where C', H', W' are C, H,
W rounded up to whole windows, with what is added behind; bias `[heads, T, T]` for windows of T
tokens; output `[B, C, H, W, heads * D]`. A grid of two axes has C and its window 1. At most 256
tokens in a window, with a bias 64, of at most 256 bytes for a head: D is a power of two from 16 to
128, in float32 to 64.
Numerics: products in the dtype of qkv with sums in float32, the bias and softmax in float32;
exponentials, probabilities and their gradients are rounded to the dtype of qkv before products.
Those gradients are taken 16 times as large, so that in float16 they overflow beyond 4094, to
infinities and NaN, for which a loss scaler skips the step. The bias's gradient adds float32 in a
fixed order.
Memory: qkv and the output move once. Backward of at most 64 tokens moves qkv, dy and dqkv once; a
fixed number of programs each leave their sum of the bias's gradient, 4 bytes per head and pair of
tokens. Of more tokens backward reads keys and values twice, queries and dy once and again for every
64 tokens of a window, and writes dqkv once; its kernels pass on 8 bytes per token and head. Kept:
qkv and the bias.
Source: Liu et al. 2021 (arXiv 2103.14030), equation 4 and the masks of section 3.2; the wrapping
mask of Bodnar et al. 2024 (arXiv 2405.13063).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft_kernels.device import (
    FLOAT_DTYPES,
    HEAD_COLUMNS,
    ceil_div,
    launch,
    multiprocessors,
    next_power_of_2,
    runs_triton,
)
from fastft_kernels.dispatch import as_differentiable_op, as_op
from fastft_kernels.window_grid import Grid, Triple, plain_backward
from fastft_kernels.window_grid import reference as reference
from fastft_kernels.window_kernels import (
    forward,
    keys_backward,
    queries_backward,
    small_backward,
)

MAX_TOKENS = 256
# In a window that one program has whole in its backward; with a bias there may be no more.
SMALL_TOKENS = 64
_PROGRAMS_PER_SM = 2
MAX_HEAD_BYTES = 256


def _parts(tokens: int) -> tuple[int, int]:
    """A window's keys as two powers of two; the second is 0 where one is enough."""
    whole = next_power_of_2(tokens)
    main = whole // 2
    if whole == tokens or main < 16:
        return max(whole, 16), 0
    tail = max(next_power_of_2(tokens - main), 16)
    return (main, tail) if main + tail < whole else (whole, 0)


def _launch(
    kernel: Any,
    programs: tuple[int, ...],
    tensors: Any,
    qkv: Tensor,
    heads: int,
    grid: Grid,
    products: int,
    **options: int,
) -> None:
    """The kernel's programs over the windows of all heads; of each they compute so many matrix
    products."""
    columns = qkv.shape[-1] // 3 // heads
    launch(
        kernel,
        programs,
        qkv.device,
        *tensors,
        *(heads, columns**-0.5, *grid.size, *grid.padded, *grid.shift),
        T=grid.tokens,
        WC=grid.window[0],
        WH=grid.window[1],
        WW=grid.window[2],
        SHIFTED=any(grid.shift),
        WRAPS=grid.wraps,
        PADDED=grid.padded != grid.size,
        D=columns,
        flops=products * _product_flops(qkv.shape, grid.window),
        **options,
    )


def _launch_forward(qkv: Tensor, bias: Tensor | None, heads: int, grid: Grid, y: Tensor) -> None:
    main, tail = _parts(grid.tokens)
    programs = (len(qkv) * grid.windows * heads, 1)
    options = {"MAIN": main, "TAIL": tail, "ROWS": 64, "HAS_BIAS": bias is not None}
    tensors = (qkv, qkv if bias is None else bias, y)
    # As in the backward of small windows.
    warps = 8 if qkv.dtype is torch.float32 and grid.tokens <= SMALL_TOKENS else 4
    options |= {"num_warps": warps, "num_stages": 1}
    _launch(forward, programs, tensors, qkv, heads, grid, products=2, **options)


def _launch_small_backward(
    dy: Tensor, qkv: Tensor, bias: Tensor | None, heads: int, grid: Grid, dqkv: Tensor
) -> Tensor | None:
    """dbias in float32; None: there is no bias."""
    windows = len(qkv) * grid.windows
    programs = min(windows, max(1, multiprocessors(qkv.device) * _PROGRAMS_PER_SM // heads))
    partial = None
    if bias is not None:
        partial = bias.new_empty((programs, *bias.shape), dtype=torch.float32)
    tensors = (dy, qkv, qkv if bias is None else bias, dqkv, qkv if partial is None else partial)
    options = {"BLOCK": max(16, next_power_of_2(grid.tokens)), "HAS_BIAS": bias is not None}
    if qkv.dtype is torch.float32:
        # Products hold their operands in registers, which fewer warps have too few of.
        options |= {"num_warps": 16, "num_stages": 1}
    else:
        # As much ahead as the shared memory of two programs per multiprocessor holds.
        wide = qkv.shape[-1] // 3 // heads > 64
        options |= {"num_warps": 4, "num_stages": 2 if wide else 3}
    tensors = (*tensors, windows)
    _launch(small_backward, (heads, programs), tensors, qkv, heads, grid, products=5, **options)
    return None if partial is None else partial.sum(0)


def _launch_backward(dy: Tensor, qkv: Tensor, heads: int, grid: Grid, dqkv: Tensor) -> None:
    count = len(qkv) * grid.windows * heads
    statistics = qkv.new_empty((count, grid.tokens, 2), dtype=torch.float32)
    tensors = (dy, qkv, dqkv, statistics)
    main, tail = _parts(grid.tokens)
    options = {"MAIN": main, "TAIL": tail, "ROWS": 64, "num_warps": 4, "num_stages": 1}
    _launch(queries_backward, (count, 1), tensors, qkv, heads, grid, products=3, **options)
    options = {"KEYS": 64, "ROWS": 16, "num_warps": 4, "num_stages": 3}
    programs = (count, ceil_div(grid.tokens, 64))
    _launch(keys_backward, programs, tensors, qkv, heads, grid, products=4, **options)


def _run_forward(
    qkv: Tensor,
    heads: int,
    size: list[int],
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    wraps: bool,
) -> Tensor:
    y = _forward_fake(qkv, heads, size, window, shift, bias, wraps)
    if not runs_triton(qkv):
        return y.copy_(reference(qkv, heads, *_triples(size, window, shift), bias, wraps))
    if y.numel():
        grid = Grid(*_triples(size, window, shift), wraps)
        bias = None if bias is None else bias.contiguous()
        _launch_forward(qkv.contiguous(), bias, heads, grid, y)
    return y


def _forward_fake(qkv, heads, size, window, shift, bias, wraps):
    return qkv.new_empty((len(qkv), *size, qkv.shape[-1] // 3))


def _triples(*values: list[int]) -> tuple[Triple, Triple, Triple]:
    size, window, shift = ((c, h, w) for c, h, w in values)
    return size, window, shift


def _run_backward(
    dy: Tensor,
    qkv: Tensor,
    heads: int,
    size: list[int],
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    wraps: bool,
) -> tuple[Tensor, Tensor]:
    """(dqkv, dbias); without a bias the latter is empty."""
    dqkv, dbias = _backward_fake(dy, qkv, heads, size, window, shift, bias, wraps)
    grid = Grid(*_triples(size, window, shift), wraps)
    found = None
    if not runs_triton(qkv):
        whole, found = plain_backward(
            dy, qkv, heads, grid.size, grid.window, grid.shift, bias, wraps
        )
        dqkv.copy_(whole)
    elif not dy.numel():
        dbias.zero_()
    elif grid.tokens > SMALL_TOKENS:
        _launch_backward(dy.contiguous(), qkv.contiguous(), heads, grid, dqkv)
    else:
        bias = None if bias is None else bias.contiguous()
        dy, qkv = dy.contiguous(), qkv.contiguous()
        found = _launch_small_backward(dy, qkv, bias, heads, grid, dqkv)
    return dqkv, dbias if found is None else dbias.copy_(found)


def _backward_fake(dy, qkv, heads, size, window, shift, bias, wraps):
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return dqkv, qkv.new_empty(0) if bias is None else bias.new_empty(bias.shape)


_backward = as_op("fastft::window_attention_backward", _run_backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    qkv, *ctx.sizes, bias, ctx.wraps = inputs
    ctx.save_for_backward(qkv, bias)


def _autograd(ctx, dy):
    qkv, bias = ctx.saved_tensors
    heads, *sizes = ctx.sizes
    if torch.is_grad_enabled():
        # create_graph=True: plain torch, which autograd can differentiate again.
        dqkv, dbias = plain_backward(dy, qkv, heads, *_triples(*sizes), bias, ctx.wraps)
    else:
        dqkv, dbias = _backward(dy, qkv, heads, *sizes, bias, ctx.wraps)
    return dqkv, None, None, None, None, None if bias is None else dbias, None


_forward = as_differentiable_op(
    "fastft::window_attention_forward", _run_forward, _forward_fake, _setup_context, _autograd
)


@register_flop_formula(torch.ops.fastft.window_attention_forward)
def _forward_flops(qkv_shape, heads, size, window, *_, **__) -> int:
    """Two products; without it a partitioner thinks the op free to recompute."""
    return 2 * _product_flops(qkv_shape, window)


@register_flop_formula(torch.ops.fastft.window_attention_backward)
def _backward_flops(dy_shape, qkv_shape, heads, size, window, *_, **__) -> int:
    """Five, and of large windows seven: both kernels compute scores and the probabilities'
    gradients."""
    products = 5 if math.prod(window) <= SMALL_TOKENS else 7
    return products * _product_flops(qkv_shape, window)


def _product_flops(qkv_shape, window) -> int:
    return 2 * math.prod(qkv_shape) // 3 * math.prod(window)


def window_attention(
    qkv: Tensor,
    heads: int,
    size: Triple,
    window: Triple,
    shift: Triple = (0, 0, 0),
    bias: Tensor | None = None,
    wraps: bool = True,
) -> Tensor:
    """Attention within the windows of a grid; see above for shapes and order.

    Args:
        size: C, H, W of the grid before padding.
        shift: along each axis less than the window, and 0 where one window covers the axis.
        bias: added to the scores of every window, in float32 or the dtype of qkv.
        wraps: the two ends of the last axis are neighbours.

    Raises:
        ValueError: another shape or dtype, another shift, a window of more than 256 tokens or with
            a bias 64, a head of other sizes.
    """
    grid = Grid(size, window, shift, wraps)
    if any(s and not 0 < s < w < n for n, w, s in zip(size, window, shift, strict=True)):
        raise ValueError(
            f"window_attention: a shift must be less than the window, and 0 where one window covers"
            f" the axis; got {shift} for windows {window} of a grid {size}; correct it"
        )
    if qkv.dim() != 5 or tuple(qkv.shape[1:4]) != grid.padded or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"window_attention: qkv must be [B, {', '.join(map(str, grid.padded))}, 3 * heads * D]"
            f" with {heads} heads; got {tuple(qkv.shape)}; pad it behind"
        )
    if qkv.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"window_attention: qkv must be float32, bfloat16 or float16; got {qkv.dtype}; cast it"
        )
    columns = qkv.shape[-1] // (3 * heads)
    fits = columns in HEAD_COLUMNS and columns * qkv.element_size() <= MAX_HEAD_BYTES
    if grid.tokens > MAX_TOKENS or not fits:
        raise ValueError(
            f"window_attention: a window must have at most {MAX_TOKENS} tokens and a head 16, 32,"
            f" 64 or, in 16 bits, 128 columns; got {grid.tokens} and {columns}; use reference there"
        )
    if bias is not None:
        _check_bias(bias, qkv, heads, grid.tokens)
    return _forward(qkv, heads, list(size), list(window), list(shift), bias, wraps)


def _check_bias(bias: Tensor, qkv: Tensor, heads: int, tokens: int) -> None:
    if tokens > SMALL_TOKENS:
        raise ValueError(
            f"window_attention: with a bias a window must have at most {SMALL_TOKENS} tokens; got"
            f" {tokens}; use reference there"
        )
    if tuple(bias.shape) != (heads, tokens, tokens) or bias.dtype not in (
        torch.float32,
        qkv.dtype,
    ):
        raise ValueError(
            f"window_attention: the bias must be [{heads}, {tokens}, {tokens}] in float32 or"
            f" {qkv.dtype}; got {list(bias.shape)} in {bias.dtype}; reshape or cast it"
        )
