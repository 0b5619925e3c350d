"""Attention within windows of a 3D grid, shifted or not, read and written where the tokens lie.

Formula: softmax(q k^T / sqrt(D) + mask) v within each window. The grid is rolled by minus the
shift, padded on both sides to whole windows, and cut into them. Where it is shifted, tokens that
the roll made neighbours are told apart by -100 in the mask, as is padding; the two ends of the last
axis stay neighbours, as longitudes are. Without a shift padding is attended to, as its queries,
keys and values say.
The roll, the windows and the mask exist only as indices: nothing is copied, no mask is stored.

Shapes: qkv `[B, C', H', W', 3 * heads * D]` in the order (qkv, head, D), where C', H', W' are C, H,
W rounded up to whole windows, with what is added behind; output `[B, C, H, W, heads * D]`. At most
256 tokens in a window, of at most 256 bytes for a head: D is a power of two from 16 to 128, in
float32 to 64.
Numerics: products in the dtype of qkv with sums in float32, softmax in float32; exponentials,
probabilities and their gradients are rounded to the dtype of qkv before products.
Memory: qkv and the output move once. Backward reads keys and values twice, queries and dy once and
again for every 64 tokens of a window, and writes dqkv once; its kernels pass on 8 bytes per token
and head. Kept: qkv.
Source: Liu et al. 2021 (arXiv 2103.14030); the mask of Bodnar et al. 2024 (arXiv 2405.13063).
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
    next_power_of_2,
    runs_triton,
)
from fastft_kernels.dispatch import as_differentiable_op, as_op
from fastft_kernels.window_grid import Grid, Triple, plain_backward
from fastft_kernels.window_grid import reference as reference
from fastft_kernels.window_kernels import forward, keys_backward, queries_backward

MAX_TOKENS = 256
_MAX_HEAD_BYTES = 256


def _parts(tokens: int) -> tuple[int, int]:
    """A window's keys as two powers of two; the second is 0 where one is enough."""
    whole = next_power_of_2(tokens)
    main = whole // 2
    if whole == tokens or main < 16:
        return max(whole, 16), 0
    tail = max(next_power_of_2(tokens - main), 16)
    return (main, tail) if main + tail < whole else (whole, 0)


def _launch(
    kernel: Any, tensors: Any, qkv: Tensor, heads: int, grid: Grid, parts: int = 1, **options: int
) -> None:
    """A program for each window of a head, or several."""
    columns = qkv.shape[-1] // 3 // heads
    launch(
        kernel,
        (len(qkv) * grid.windows * heads, parts),
        qkv.device,
        *tensors,
        *(heads, columns**-0.5, *grid.size, *grid.padded, *grid.shift),
        T=grid.tokens,
        WC=grid.window[0],
        WH=grid.window[1],
        WW=grid.window[2],
        SHIFTED=any(grid.shift),
        D=columns,
        **options,
    )


def _launch_forward(qkv: Tensor, heads: int, grid: Grid, y: Tensor) -> None:
    main, tail = _parts(grid.tokens)
    options = {"MAIN": main, "TAIL": tail, "ROWS": 64, "num_warps": 4, "num_stages": 1}
    _launch(forward, (qkv, y), qkv, heads, grid, **options)


def _launch_backward(dy: Tensor, qkv: Tensor, heads: int, grid: Grid, dqkv: Tensor) -> None:
    count = len(qkv) * grid.windows * heads
    statistics = qkv.new_empty((count, grid.tokens, 2), dtype=torch.float32)
    tensors = (dy, qkv, dqkv, statistics)
    main, tail = _parts(grid.tokens)
    options = {"MAIN": main, "TAIL": tail, "ROWS": 64, "num_warps": 4, "num_stages": 1}
    _launch(queries_backward, tensors, qkv, heads, grid, **options)
    options = {"KEYS": 64, "ROWS": 16, "num_warps": 4, "num_stages": 3}
    parts = ceil_div(grid.tokens, 64)
    _launch(keys_backward, tensors, qkv, heads, grid, parts, **options)


def _run_forward(
    qkv: Tensor, heads: int, size: list[int], window: list[int], shift: list[int]
) -> Tensor:
    y = _forward_fake(qkv, heads, size, window, shift)
    if not runs_triton(qkv):
        return y.copy_(reference(qkv, heads, *_triples(size, window, shift)))
    if y.numel():
        _launch_forward(qkv.contiguous(), heads, _grid(size, window, shift), y)
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
        grid = _grid(size, window, shift)
        _launch_backward(dy.contiguous(), qkv.contiguous(), heads, grid, dqkv)
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


@register_flop_formula(torch.ops.fastft.window_attention_forward)
def _forward_flops(qkv_shape, heads, size, window, shift, *_, **__) -> int:
    """Two products; without it a partitioner thinks the op free to recompute."""
    return 2 * _product_flops(qkv_shape, window)


@register_flop_formula(torch.ops.fastft.window_attention_backward)
def _backward_flops(dy_shape, qkv_shape, heads, size, window, shift, *_, **__) -> int:
    """Seven: both kernels compute scores and the probabilities' gradients."""
    return 7 * _product_flops(qkv_shape, window)


def _product_flops(qkv_shape, window) -> int:
    return 2 * math.prod(qkv_shape) // 3 * math.prod(window)


def window_attention(
    qkv: Tensor, heads: int, size: Triple, window: Triple, shift: Triple = (0, 0, 0)
) -> Tensor:
    """Attention within the windows of a grid; see above for shapes and order.

    Args:
        size: C, H, W of the grid before padding.
        shift: along each axis less than the window, and 0 where one window covers the axis.

    Raises:
        ValueError: another shape or dtype, another shift, a window of more than 256 tokens, a head
            of other sizes.
    """
    grid = Grid(size, window, shift)
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
    fits = columns in HEAD_COLUMNS and columns * qkv.element_size() <= _MAX_HEAD_BYTES
    if grid.tokens > MAX_TOKENS or not fits:
        raise ValueError(
            f"window_attention: a window must have at most {MAX_TOKENS} tokens and a head 16, 32,"
            f" 64 or, in 16 bits, 128 columns; got {grid.tokens} and {columns}; use reference there"
        )
    return _forward(qkv, heads, list(size), list(window), list(shift))
