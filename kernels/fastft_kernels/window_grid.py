"""A grid of tokens cut into windows after a roll, and attention in them in plain torch."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft_kernels.attention_formulas import score_gradients, split_heads
from fastft_kernels.device import ceil_div

Triple = tuple[int, int, int]

APART = -100.0


@dataclass(frozen=True)
class Grid:
    """C, H, W, windows and shift of a grid; no shift along an axis that one window covers.

    Attributes:
        wraps: the two ends of the last axis are neighbours.
    """

    size: Triple
    window: Triple
    shift: Triple
    wraps: bool = True

    @property
    def padded(self) -> Triple:
        """C, H, W as whole windows."""
        pairs = zip(self.size, self.window, strict=True)
        c, h, w = (ceil_div(n, width) * width for n, width in pairs)
        return c, h, w

    @property
    def before(self) -> Triple:
        """How much of the padding is before the grid, along each axis."""
        c, h, w = ((p - n) // 2 for p, n in zip(self.padded, self.size, strict=True))
        return c, h, w

    def pad(self, x: Tensor) -> Tensor:
        """`[B, C, H, W, D]` with zeros behind, as whole windows."""
        c, h, w = (p - n for p, n in zip(self.padded, self.size, strict=True))
        return F.pad(x, (0, 0, 0, w, 0, h, 0, c)) if c or h or w else x

    @property
    def tokens(self) -> int:
        """In a window."""
        return math.prod(self.window)

    @property
    def windows(self) -> int:
        """Of a sample."""
        return math.prod(self.padded) // self.tokens


def reference(
    qkv: Tensor,
    heads: int,
    size: Triple,
    window: Triple,
    shift: Triple = (0, 0, 0),
    bias: Tensor | None = None,
    wraps: bool = True,
) -> Tensor:
    """The formula in plain torch, with copies of the windows and the whole mask."""
    grid = Grid(size, window, shift, wraps)
    places, mask = tables(grid, len(qkv), qkv)
    q, k, v = _into_windows(qkv, 3 * heads, places).chunk(3, dim=1)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=_added(mask, bias, qkv.dtype))
    c, h, w = size
    return _out_of_windows(found, len(qkv), places).unflatten(1, grid.padded)[:, :c, :h, :w]


def plain_backward(
    dy: Tensor,
    qkv: Tensor,
    heads: int,
    size: Triple,
    window: Triple,
    shift: Triple = (0, 0, 0),
    bias: Tensor | None = None,
    wraps: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(dqkv, dbias) in the dtypes of qkv and bias, computed in float32 at least; autograd can
    differentiate them."""
    grid = Grid(size, window, shift, wraps)
    whole = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    places, mask = tables(grid, len(qkv), whole)
    q, k, v = _into_windows(whole, 3 * heads, places).chunk(3, dim=1)
    dy = _into_windows(grid.pad(dy.to(whole.dtype)), heads, places)
    scale = q.shape[-1] ** -0.5
    p, ds = score_gradients(dy, q, k, v, scale, _added(mask, bias, whole.dtype))
    scaled = ds * scale
    found = torch.cat([scaled @ k, scaled.mT @ q, p.mT @ dy], dim=1)
    dqkv = _out_of_windows(found, len(qkv), places).view(qkv.shape).to(qkv.dtype)
    return dqkv, None if bias is None else ds.sum(0).to(bias.dtype)


def _added(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores `[B * windows, heads, T, T]`."""
    if bias is None:
        return mask
    bias = bias.to(dtype)
    return bias[None] if mask is None else mask + bias


def _into_windows(x: Tensor, heads: int, places: Tensor) -> Tensor:
    """`[B, C', H', W', heads * D]` as `[B * windows, heads, T, D]`."""
    tokens = x.flatten(1, 3)[:, places.flatten()]
    count, length = places.shape
    return split_heads(tokens.view(len(x) * count, length, x.shape[-1]), heads)


def _out_of_windows(x: Tensor, batch: int, places: Tensor) -> Tensor:
    """`[B * windows, heads, T, D]` as `[B, C' * H' * W', heads * D]`."""
    tokens = x.transpose(1, 2).reshape(batch, places.numel(), x.shape[1] * x.shape[3])
    return tokens[:, places.flatten().argsort()]


def tables(grid: Grid, batch: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of each window's tokens the place in the padded input, `[windows, T]`, and the mask."""
    places, groups = (table.to(like.device) for table in _indices(grid))
    if not any(grid.shift):
        return places, None
    apart = groups[:, :, None] != groups[:, None, :]
    return places, torch.where(apart, APART, 0.0).to(like.dtype).repeat(batch, 1, 1)[:, None]


def _indices(grid: Grid) -> tuple[Tensor, Tensor]:
    """Of each window's tokens the place and the group, `[windows, T]`."""
    sources, groups, insides = [], [], []
    for axis in range(3):
        n, width, shift = grid.size[axis], grid.window[axis], grid.shift[axis]
        at = torch.arange(grid.padded[axis])
        rolled = at - grid.before[axis]
        inside = (rolled >= 0) & (rolled < n)
        behind = torch.where(rolled < 0, n + at, at)
        sources.append(torch.where(inside, (rolled + shift) % n, behind))
        apart = axis < 2 or not grid.wraps
        group = (rolled >= n - width).long() + (rolled >= n - shift) * apart
        groups.append(group * (shift > 0))
        insides.append(inside)

    def in_windows(values: list[Tensor], factors: Triple) -> Tensor:
        c, h, w = (value * factor for value, factor in zip(values, factors, strict=True))
        whole = c[:, None, None] + h[:, None] + w
        for axis, width in enumerate(grid.window):
            whole = whole.unflatten(2 * axis, (-1, width))
        return whole.permute(0, 2, 4, 1, 3, 5).reshape(grid.windows, grid.tokens)

    _, h, w = grid.padded
    places = in_windows(sources, (h * w, w, 1))
    inside = in_windows([x.long() for x in insides], (1, 1, 1)) == 3
    return places, torch.where(inside, in_windows(groups, (9, 3, 1)), 27)
