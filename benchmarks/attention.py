"""Attention in windows and over few tokens at the sizes of Aurora and Swin, beside torch's.

Torch's side of the windows is upstream's: tokens, not yet queries, keys and values, are rolled,
padded and cut into windows, what attention returns goes back, and the mask is made beforehand.
timm writes Swin's attention out, with scores in float32 where they meet the bias.
Eager or compiled, whichever is faster counts as the peer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fastft_kernels import short_attention, window_attention
from fastft_kernels.short_attention import reference as short_reference
from fastft_kernels.window_attention import reference as window_reference
from fastft_kernels.window_grid import Grid, tables
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor

from benchmarks.timing import time_device, time_host

WINDOW, SHIFT = (2, 6, 12), (1, 3, 6)
# Grid and heads of each stage, for 721 x 1440 points in patches of 4.
STAGES = (((4, 180, 360), 8), ((4, 90, 180), 16), ((4, 45, 90), 32))
# Of a chunk of patches, and of encoder and decoder.
PATCHES, PERCEIVER_HEADS = 16_200, 16
# Swin-B's, of images of 224 x 224: side of the grid, heads of 32 columns, shift of every second
# block (the last stage has one window and no shift).
IMAGES, SWIN_WINDOW, SWIN_COLUMNS = 256, (1, 7, 7), 32
SWIN_STAGES = ((56, 4, 3), (28, 8, 3), (14, 16, 3), (7, 32, 0))
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16


@dataclass(frozen=True)
class AttentionCase:
    """An op, its reference, shapes of its inputs and output, and the rest of its arguments.

    Attributes:
        grid: of windows; None: there are none.
        biased: the second input is a bias, in float32; the first has a batch.
    """

    what: dict[str, Any]
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    rest: tuple[Any, ...]
    grid: Grid | None = None
    biased: bool = False

    def make_inputs(self) -> list[Tensor]:
        """Random."""
        inputs = [torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in self.inputs]
        return [inputs[0], inputs[1].float()] if self.biased else inputs


def aurora_cases() -> Iterator[AttentionCase]:
    """Each stage of the backbone with and without a shift, then decoder and encoder."""
    for size, heads in STAGES:
        for shift in ((0, 0, 0), SHIFT):
            grid = Grid(size, WINDOW, shift)
            yield AttentionCase(
                {"op": "window_attention", "size": size, "heads": heads, "shifted": any(shift)},
                window_attention,
                window_reference,
                ((1, *grid.padded, 3 * heads * 64),),
                (1, *size, heads * 64),
                (heads, size, WINDOW, shift),
                grid,
            )
    for queries, keys, columns in ((13, 3, 64), (3, 13, 32)):
        width = PERCEIVER_HEADS * columns
        yield AttentionCase(
            {"op": "short_attention", "samples": PATCHES, "queries": queries, "keys": keys}
            | {"columns": columns},
            short_attention,
            short_reference,
            ((1, queries, width), (PATCHES, keys, 2 * width)),
            (PATCHES, queries, width),
            (PERCEIVER_HEADS,),
        )


def swin_cases() -> Iterator[AttentionCase]:
    """Each stage with and without a shift."""

    def biased(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda qkv, bias, *rest: op(qkv, *rest, bias, wraps=False)

    for side, heads, shift in SWIN_STAGES:
        size, width = (1, side, side), heads * SWIN_COLUMNS
        tokens = SWIN_WINDOW[1] * SWIN_WINDOW[2]
        for s in sorted({0, shift}):
            grid = Grid(size, SWIN_WINDOW, (0, s, s), wraps=False)
            yield AttentionCase(
                {"op": "window_attention", "size": size, "heads": heads, "shifted": s > 0}
                | {"images": IMAGES},
                biased(window_attention),
                biased(window_reference),
                ((IMAGES, *size, 3 * width), (heads, tokens, tokens)),
                (IMAGES, *size, width),
                (heads, size, SWIN_WINDOW, grid.shift),
                grid,
                biased=True,
            )


def make_timm_windows(grid: Grid, heads: int, mask: Tensor | None) -> Callable[..., Any]:
    """timm's way to attention in windows and back, under autocast.

    The function takes queries, keys and values in windows, `[B * windows, T, 3 * heads * D]`, the
    bias and tokens `[B, 1, H, W, N]`; it returns attention `[B, 1, H, W, heads * D]` and the
    tokens in windows.
    """
    _, height, width = grid.size
    window = grid.window[1:]
    back = tuple(-s for s in grid.shift[1:])

    def attend(qkv: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x[:, 0].roll(back, (1, 2)) if any(back) else x[:, 0]
        windows = window_partition(x, window).flatten(1, 2)
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        scores = q * q.shape[-1] ** -0.5 @ k.mT + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        y = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        y = window_reverse(y.unflatten(1, window), window, height, width)
        return (y.roll(grid.shift[1:], (1, 2)) if any(back) else y)[:, None], windows

    return attend


def make_windows(grid: Grid, heads: int, mask: Tensor | None) -> Callable[..., Any]:
    """Upstream's way to attention in windows and back.

    The function takes queries, keys and values in windows, `[windows, T, 3 * heads * D]`, and
    tokens `[1, C, H, W, N]`; it returns attention `[1, C, H, W, heads * D]` and the tokens in
    windows.
    """
    (c, h, w), (wc, wh, ww) = grid.padded, grid.window
    cut = (1, c // wc, wc, h // wh, wh, w // ww, ww, -1)
    sides = [0, 0]
    for before, n, padded in reversed([*zip(grid.before, grid.size, grid.padded, strict=True)]):
        sides += [before, padded - n - before]
    inside = [slice(b, b + n) for b, n in zip(grid.before, grid.size, strict=True)]
    back = tuple(-s for s in grid.shift)

    def attend(qkv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.pad(x.roll(back, (1, 2, 3)) if any(back) else x, sides)
        windows = x.view(cut).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, grid.tokens, x.shape[-1])
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        y = y.view(1, c // wc, h // wh, w // ww, wc, wh, ww, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        y = y.reshape(1, c, h, w, -1)[:, *inside]
        return y.roll(grid.shift, (1, 2, 3)) if any(back) else y, windows

    return attend


def make_peer(
    case: AttentionCase, inputs: list[Tensor], dy: Tensor
) -> tuple[Callable[..., Any], list[Tensor], list[Tensor]]:
    """Torch's function, its inputs and the gradients of its outputs."""
    if case.grid is None:
        return lambda *x: case.reference(*x, *case.rest), inputs, [dy]
    qkv, *bias = inputs
    places, mask = tables(case.grid, 1, qkv)
    windows = qkv.flatten(1, 3)[:, places].flatten(0, 1)
    make = make_timm_windows if case.biased else make_windows
    attend = make(case.grid, case.rest[0], mask)
    found, moved = attend(windows, *bias, dy)
    truth = case.reference(*inputs, *case.rest)
    if not (found - truth).norm() <= 2e-2 * truth.norm():
        raise SystemExit(f"{case.what}: torch's side is wrong; not timed")
    return attend, [windows, *bias, torch.randn_like(dy)], [dy, torch.randn_like(moved)]


def outcome(case: AttentionCase, function: Any, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves, *case.rest)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check(case: AttentionCase, inputs: list[Tensor], dy: Tensor) -> None:
    """Refuses an op that is further from float32 than twice torch's bf16 attention is."""
    truths = outcome(case, case.reference, [x.float() for x in inputs], dy)
    eager, fused = (outcome(case, f, inputs, dy) for f in (case.reference, case.op))
    for got, plain, truth in zip(fused, eager, truths, strict=True):
        allowed = 2 * (plain - truth).norm() + 1e-3 * truth.norm()
        if not (got - truth).norm() <= allowed:
            raise SystemExit(f"{case.what}: wrong; not timed")


def bench_attention(records: Any, cases: Iterator[AttentionCase]) -> None:
    """Forward and backward of every case."""
    for case in cases:
        torch.manual_seed(0)
        inputs = case.make_inputs()
        dy = torch.randn(case.output, device=DEVICE, dtype=DTYPE)
        check(case, inputs, dy)
        torch._dynamo.reset()
        # What our op moves at least, whoever computes.
        read = sum(x.nbytes for x in inputs)
        moved = {"forward": read + 2 * dy.numel(), "backward": 2 * read + 2 * dy.numel()}
        eager, theirs, grads = make_peer(case, inputs, dy)
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        for provider, function, tensors, dys in (
            ("fastft", lambda *x, case=case: case.op(*x, *case.rest), inputs, [dy]),
            ("torch", eager, theirs, grads),
            ("torch.compile", compiled, theirs, grads),
        ):
            what = {**case.what, "provider": provider}
            measure(records, what, function, tensors, dys, moved)
        torch.cuda.empty_cache()


def measure(
    records: Any,
    what: dict[str, Any],
    function: Callable[..., Any],
    inputs: list[Tensor],
    dys: list[Tensor],
    moved: dict[str, int],
) -> None:
    """One provider's records."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> Any:
        return function(*leaves)

    outputs = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, dys, retain_graph=True)

    for direction, call in (("forward", forward), ("backward", backward)):
        host, timing = time_host(call), time_device(call, repeats=10)
        records.add({**what, "direction": direction}, timing, moved[direction], host_us=host)
