"""A grid of tokens cut into windows after a roll, and attention in them in plain torch."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft_kernels.device import ceil_div

Triple = tuple[int, int, int]

APART = -100.0


@dataclass(frozen=True)
class Grid:
    """C, H, W, windows and shift of a grid; no shift along an axis that one window covers."""

    size: Triple
    window: Triple
    shift: Triple

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

    @property
    def tokens(self) -> int:
        """In a window."""
        return math.prod(self.window)

    @property
    def windows(self) -> int:
        """Of a sample."""
        return math.prod(self.padded) // self.tokens


def reference(
    qkv: Tensor, heads: int, size: Triple, window: Triple, shift: Triple = (0, 0, 0)
) -> Tensor:
    """The formula in plain torch, with copies of the windows and the whole mask."""
    grid = Grid(size, window, shift)
    places, groups = (table.to(qkv.device) for table in _tables(grid))
    batch, width = len(qkv), qkv.shape[-1] // 3
    tokens = qkv.reshape(batch, -1, 3 * width)[:, places.flatten()]
    tokens = tokens.view(batch * grid.windows, grid.tokens, 3, heads, width // heads)
    q, k, v = tokens.permute(2, 0, 3, 1, 4)
    mask = None
    if any(shift):
        apart = groups[:, :, None] != groups[:, None, :]
        mask = torch.where(apart, APART, 0.0).to(qkv.dtype).repeat(batch, 1, 1)[:, None]
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = found.transpose(1, 2).reshape(batch, -1, width)
    c, h, w = size
    back = places.flatten().argsort().view(grid.padded)[:c, :h, :w]
    return found[:, back.flatten()].view(batch, *size, width)


def _tables(grid: Grid) -> tuple[Tensor, Tensor]:
    """Of each window's tokens the place in the padded input and the group, `[windows, T]`."""
    sources, groups, insides = [], [], []
    for axis in range(3):
        n, width, shift = grid.size[axis], grid.window[axis], grid.shift[axis]
        at = torch.arange(grid.padded[axis])
        rolled = at - grid.before[axis]
        inside = (rolled >= 0) & (rolled < n)
        behind = torch.where(rolled < 0, n + at, at)
        sources.append(torch.where(inside, (rolled + shift) % n, behind))
        # The ends of the last axis are neighbours.
        group = (rolled >= n - width).long() + (rolled >= n - shift) * (axis < 2)
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
