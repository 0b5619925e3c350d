"""Swin blocks of timm on fastft's attention in windows.

timm rolls the grid, cuts it into windows and back with a copy each, and writes attention out, with
all scores in memory. A linear layer does not mind where a token lies, so here queries, keys and
values are made in place, and the kernel finds its windows by index.
Weights, names and formulas are timm's; rounding is not to the bit.
"""

from collections import Counter
from types import MethodType
from typing import cast

from fastft_kernels import window_attention
from fastft_kernels.device import FLOAT_DTYPES, HEAD_COLUMNS, output_dtype
from fastft_kernels.modules import has_hooks
from fastft_kernels.window_attention import MAX_HEAD_BYTES, SMALL_TOKENS
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

Pair = tuple[int, int]


def use_kernels(model: nn.Module) -> list[str]:
    """Sets the attention of Swin blocks in place; names and state dict stay as they are.

    To be called when all changes to the model are made: what was changed is left as it is.

    Returns:
        What is left to timm's operators, a line for each reason.
    """
    left: Counter[str] = Counter()
    for module in model.modules():
        if not isinstance(module, SwinTransformerBlock):
            continue
        obstacle = _obstacle(module)
        if obstacle is None:
            # Bound, so that a deep copy of the module computes with the copy's weights. A pickle
            # names it, and is loaded with timm's.
            module._attn = MethodType(_attn, module)
        else:
            left[f"Swin blocks run on timm's operators, because {obstacle}"] += 1
    return [f"{count} {reason}" for reason, count in left.items()]


def _obstacle(block: SwinTransformerBlock) -> str | None:
    attention = block.attn
    if _was_changed(block):
        return "they or their attention were changed"
    if attention.attn_drop.p > 0:
        return "they have dropout of attention"
    if attention.window_area > SMALL_TOKENS:
        return f"their windows have {attention.window_area} tokens, more than {SMALL_TOKENS}"
    if (columns := _columns(attention)) not in HEAD_COLUMNS:
        return f"their heads have {columns} columns"
    if not _fits(block, cast(Pair, block.input_resolution)):
        return "windows do not divide their grid, or are shifted where one covers it"
    return None


def _was_changed(block: SwinTransformerBlock) -> bool:
    """Whether anything was added to what timm's attention calls and ours does not."""
    attention = block.attn
    parts = (attention.softmax, attention.attn_drop)
    return (
        type(block) is not SwinTransformerBlock
        or type(attention) is not WindowAttention
        or "_attn" in vars(block)
        or "forward" in vars(attention)
        or has_hooks(attention)
        or [type(part) for part in parts] != [nn.Softmax, nn.Dropout]
    )


def _columns(attention: WindowAttention) -> int:
    """Of a head."""
    return attention.proj.in_features // attention.num_heads


def _fits(block: SwinTransformerBlock, size: Pair) -> bool:
    """Whether the grid is whole windows, and more than one along each axis that is shifted."""
    along = zip(size, block.window_size, block.shift_size, strict=True)
    return all(n % window == 0 and (shift == 0 or shift < window < n) for n, window, shift in along)


def _attn(self: SwinTransformerBlock, x: Tensor) -> Tensor:
    """`[B, H, W, C]` of a grid that is not rolled; other sizes and precisions are timm's."""
    attention, dtype = self.attn, output_dtype(x)
    height, width = x.shape[1:3]
    # Windows may have grown since: timm's `set_input_size` does that.
    large = attention.window_area > SMALL_TOKENS
    large |= _columns(attention) * dtype.itemsize > MAX_HEAD_BYTES
    if large or dtype not in FLOAT_DTYPES or not _fits(self, (height, width)):
        return SwinTransformerBlock._attn(self, x)
    y = window_attention(
        attention.qkv(x)[:, None],
        attention.num_heads,
        (1, height, width),
        (1, *self.window_size),
        (0, *self.shift_size),
        attention._get_rel_pos_bias()[0],
        wraps=False,
    )
    return attention.proj_drop(attention.proj(y[:, 0]))
