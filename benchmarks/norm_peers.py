"""What is timed beside the catalog's norms."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastft_kernels.catalog import OpCase
from torch import Tensor

# Compiling takes longer than measuring; the other forms follow from these.
COMPILED = ("layer_norm", "residual_layer_norm", "adaptive_layer_norm_residual")
FROM_TORCH = ("eager", "compile", "compile, early launch", "compile, fp32 weights")
Provider = tuple[str, Callable[..., Any], torch.dtype | None]


def providers(case: OpCase, columns: int, *, search: bool) -> Iterator[Provider]:
    """(name, function, dtype of the parameters or None for what the catalog makes).

    search: also the fastest of quack's schedules, which it tries for minutes at each width.
    """
    yield "fastft", case.op, None
    if case.name == "layer_norm":
        # What most peers get: they have no bf16 input with float32 weights.
        yield "fastft, bf16 weights", case.op, torch.bfloat16
    yield "eager", case.reference, torch.bfloat16
    if case.name in COMPILED:
        compiled = torch.compile(case.reference, fullgraph=True, dynamic=False)
        yield "compile", compiled, torch.bfloat16
    if case.name == "layer_norm":
        early = torch.compile(
            case.reference, fullgraph=True, dynamic=False, options={"triton.enable_pdl": True}
        )
        yield "compile, early launch", early, torch.bfloat16
        yield "compile, fp32 weights", torch.compile(_autocast_norm, dynamic=False), None
        # Of longer rows it tries schedules that need more shared memory than there is, and raises.
        yield from _installed(search and columns <= 4096)


def _installed(search: bool) -> Iterator[Provider]:
    """The libraries that are there; quack's layer norm takes float32 weights only."""
    if importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        yield "liger", lambda x, w, b: liger.apply(x, w, b, 1e-5), torch.bfloat16
    if importlib.util.find_spec("quack"):
        yield "quack", lambda x, w, b: _Quack.apply(x, w, b, False), None
        if search:
            yield "quack, tuned", lambda x, w, b: _Quack.apply(x, w, b, True), None


def _autocast_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm of a bf16 tensor with float32 weights, as autocast and the next cast make it."""
    y = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight, bias)
    return y.to(x.dtype)


class _Quack(torch.autograd.Function):
    """quack has both directions of a layer norm, and no autograd function around them.

    tuned: the fastest of its schedules, tried at the first call of a shape; else its own choice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, tuned: bool) -> Tensor:
        # As an attribute of the package this name is a function, which hides the module.
        quack = importlib.import_module("quack.rmsnorm")
        rows = x.view(-1, x.shape[-1])
        if tuned:
            y = torch.empty_like(rows)
            rstd, mean = (torch.empty(len(rows), device=x.device) for _ in range(2))
            options = {"eps": 1e-5, "is_layernorm": True}
            quack.rmsnorm_fwd_tuned(rows, weight, y, bias, rstd, mean, **options)
        else:
            y, rstd, mean = quack.layernorm_fwd(rows, weight, bias, 1e-5, True, True)
        ctx.quack, ctx.tuned = quack, tuned
        ctx.save_for_backward(rows, weight, rstd, mean)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, rstd, mean = ctx.saved_tensors
        dy = grads[0].view(rows.shape)
        if ctx.tuned:
            dx, columns = torch.empty_like(rows), rows.shape[1]
            programs = ctx.quack.get_sm_count(columns, rows.device)
            parts = [torch.empty(programs, columns, device=rows.device) for _ in range(2)]
            options = {"mean": mean, "is_layernorm": True}
            options |= {"has_dw_partial": True, "has_db_partial": True}
            ctx.quack.rmsnorm_bwd_tuned(rows, weight, dy, rstd, dx, *parts, **options)
            dweight, dbias = (part.sum(0) for part in parts)
        else:
            dx, dweight, dbias = ctx.quack.layernorm_bwd(rows, weight, dy, rstd, mean)
        return dx.view(grads[0].shape), dweight, dbias, None
