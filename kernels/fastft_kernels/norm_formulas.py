"""A norm over rows in plain torch: the CPU path, and what a second derivative goes through."""

from torch import Tensor


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(var + eps)) over the last dimension of `[rows, N]`, float32 `[rows]`."""
    mean = x.float().mean(-1, keepdim=True)
    variance = (x.float() - mean).square().mean(-1)
    return mean[..., 0], (variance + eps).rsqrt()


def plain_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of `layer_norm`, float32."""
    rows = dy.reshape(-1, s.shape[-1]).float()
    h = _normalised(s, mean, rstd)
    c = rows if weight is None else rows * weight.float()
    dx = _input_gradient(c, h, rstd).reshape(s.shape)
    return dx if ds is None else dx + ds.float(), (rows * h).sum(0), rows.sum(0)


def plain_adaptive_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift) of `adaptive_layer_norm`, float32."""
    h = _normalised(x, mean, rstd)
    # Of no samples, the number of rows cannot be worked out.
    dy = dy.reshape(len(scale), len(h) // max(1, len(scale)), x.shape[-1]).float()
    c = (dy * (1 + scale.float())[:, None]).reshape(h.shape)
    dx = _input_gradient(c, h, rstd).reshape(x.shape)
    return dx, (dy * h.view(dy.shape)).sum(1), dy.sum(1)


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.reshape(-1, x.shape[-1]).float() - mean[:, None]) * rstd[:, None]


def _input_gradient(c: Tensor, h: Tensor, rstd: Tensor) -> Tensor:
    inner = c - c.mean(-1, keepdim=True) - h * (c * h).mean(-1, keepdim=True)
    return inner * rstd[:, None]
