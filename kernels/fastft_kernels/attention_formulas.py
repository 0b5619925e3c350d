"""Attention in plain torch: heads apart and together, and what all its backwards begin with."""

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[S, T, heads * D]` as `[S, heads, T, D]`."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """`[S, heads, T, D]` as `[S, T, heads * D]`."""
    return x.transpose(1, 2).flatten(2)


def score_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By head: p = softmax(scale q k^T + bias), and the gradients of what is in the brackets."""
    scores = q @ k.mT * scale
    p = (scores if bias is None else scores + bias).softmax(-1)
    dp = dy @ v.mT
    return p, p * (dp - (p * dp).sum(-1, keepdim=True))
