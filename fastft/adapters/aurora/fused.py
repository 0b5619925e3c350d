"""Swin blocks, where they compute in 16 bits, and perceivers on fastft's kernels.

Upstream rolls, pads and cuts the grid into windows, and back, with a copy each, masks shifted
windows by a dense matrix, and norms in float32 operator by operator. A linear layer does not mind
where a token lies, so here queries, keys and values are made in place, and the kernels do the rest.
A perceiver attends from few queries to few keys at each of very many patches, which kernels for
long sequences do slowly; its first queries are the same for all patches.
Weights, names and formulas are upstream's; rounding is not to the bit.
"""

import math
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal, cast

import torch
from aurora.model.film import AdaptiveLayerNorm
from aurora.model.perceiver import PerceiverAttention
from aurora.model.swin3d import Swin3DTransformerBlock, WindowAttention
from aurora.model.util import maybe_adjust_windows
from fastft_kernels import adaptive_layer_norm, short_attention, window_attention
from fastft_kernels.device import FLOAT_DTYPES, HEAD_COLUMNS, output_dtype
from fastft_kernels.modules import has_hooks
from fastft_kernels.short_attention import MAX_TOKENS as MAX_LEVELS
from fastft_kernels.window_attention import MAX_TOKENS as MAX_WINDOW
from fastft_kernels.window_grid import Grid
from torch import Tensor, nn

Triple = tuple[int, int, int]
Residual = Literal["fp32", "autocast"]
_LOW = (torch.bfloat16, torch.float16)


def use_kernels(model: nn.Module, residual: Residual) -> list[str]:
    """Sets the forwards of Swin blocks, which in 32 bits are upstream's, and of perceivers.

    To be called when all changes to the model are made: what was changed is left as it is.

    Args:
        residual: 'fp32': what blocks add to is in float32, as upstream on a GPU; 'autocast': it
            stays as it comes, which is in 16 bits from the first downsampling on.

    Returns:
        What is left to upstream's operators, a line for each reason.
    """
    forward = _swin_forward(residual == "fp32")
    left: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, Swin3DTransformerBlock):
            kind, run, obstacle = "Swin blocks", forward, _block_obstacle(module)
        elif isinstance(module, PerceiverAttention):
            kind, run, obstacle = "perceivers", _attend_levels, _perceiver_obstacle(module)
        else:
            continue
        if obstacle is None:
            # Bound, so that a deep copy of the module computes with the copy's weights.
            module.forward = MethodType(run, module)
        else:
            left[f"{kind} run on upstream's operators, because {obstacle}"] += 1
    return [f"{count} {reason}" for reason, count in left.items()]


def _block_obstacle(block: Swin3DTransformerBlock) -> str | None:
    if _was_changed(block):
        return "they or their parts were changed"
    # Random numbers in attention or of whole paths are upstream's alone.
    if block.attn.attn_drop != 0 or not isinstance(block.drop_path, nn.Identity):
        return "they have dropout of attention or of paths"
    if (tokens := math.prod(block.window_size)) > MAX_WINDOW:
        return f"their windows have {tokens} tokens, more than {MAX_WINDOW}"
    return _heads_obstacle(block.attn.head_dim)


def _perceiver_obstacle(perceiver: PerceiverAttention) -> str | None:
    if not _is_upstreams(perceiver, PerceiverAttention):
        return "they were changed"
    return _heads_obstacle(perceiver.head_dim)


def _heads_obstacle(columns: int) -> str | None:
    return None if columns in HEAD_COLUMNS else f"their heads have {columns} columns"


def _was_changed(block: Swin3DTransformerBlock) -> bool:
    """Whether anything was added to what upstream's forward calls and ours does not."""
    norms = (block.norm1, block.norm2)
    return not (
        _is_upstreams(block, Swin3DTransformerBlock)
        and _is_bare(block.attn, WindowAttention)
        and all(_is_bare(n, AdaptiveLayerNorm) and _is_bare(n.ln, nn.LayerNorm) for n in norms)
    )


def _is_upstreams(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind and "forward" not in vars(module)


def _is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Without hooks, as an added norm (`extend`) is one; a norm also without weights."""
    weights = isinstance(module, nn.LayerNorm) and module.elementwise_affine
    return _is_upstreams(module, kind) and not weights and not has_hooks(module)


def _swin_forward(whole: bool) -> Callable[..., Tensor]:
    def forward(
        self: Swin3DTransformerBlock,
        x: Tensor,
        c: Tensor,
        res: Triple,
        rollout_step: int,
        warped: bool = True,
    ) -> Tensor:
        # With noise a condition has its own value for each token.
        if output_dtype(x) not in _LOW or c.dim() != 2 or not warped:
            return Swin3DTransformerBlock.forward(self, x, c, res, rollout_step, warped)
        grid = Grid(res, *maybe_adjust_windows(self.window_size, self.shift_size, res))
        shortcut = x.float() if whole else x
        y = _attend(self.attn, x.view(len(x), *res, -1), grid, rollout_step).view(x.shape)
        x = _normed(self.norm1, y, c, shortcut)
        return _normed(self.norm2, self.mlp(x), c, x)

    return forward


def _attend(attention: WindowAttention, x: Tensor, grid: Grid, rollout_step: int) -> Tensor:
    """`[B, C, H, W, D]` of a grid that is not rolled."""
    x = grid.pad(x)
    lora = cast(Any, attention)
    qkv = attention.qkv(x) + lora.lora_qkv(x, rollout_step)
    y = window_attention(qkv, attention.num_heads, grid.size, grid.window, grid.shift)
    return attention.proj_drop(attention.proj(y) + lora.lora_proj(y, rollout_step))


def _normed(norm: AdaptiveLayerNorm, x: Tensor, c: Tensor, residual: Tensor) -> Tensor:
    shift, scale = norm.ln_modulation(c).chunk(2, dim=-1)
    # The kernel's scale is about 1; in 16 bits the difference would be lost.
    scale = scale.float() + (norm.scale_bias - 1)
    return adaptive_layer_norm(x, scale, shift, residual, norm.ln.eps)


def _attend_levels(self: PerceiverAttention, latents: Tensor, x: Tensor) -> Tensor:
    """Of `[B, L1, D1]`, which may be one sample's expanded, to `[B, L2, D2]`."""
    if max(latents.shape[1], x.shape[1]) > MAX_LEVELS or output_dtype(x) not in FLOAT_DTYPES:
        return PerceiverAttention.forward(self, latents, x)
    same = latents.stride(0) == 0
    q = self.ln_q(self.to_q(latents[:1] if same else latents))
    kv = self.to_kv(x)
    if isinstance(self.ln_k, nn.LayerNorm):
        k, v = kv.chunk(2, dim=-1)
        kv = torch.cat([self.ln_k(k).to(v.dtype), v], dim=-1)
    return self.to_out(short_attention(q.to(kv.dtype), kv, self.num_heads))
