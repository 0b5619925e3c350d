"""Attention in windows and over few tokens at the sizes of Aurora, beside torch's attention.

Torch's side rolls, pads and cuts the grid into windows and back, and has the mask made beforehand;
eager or compiled, whichever is faster counts as the peer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastft_kernels import short_attention, window_attention
from fastft_kernels.short_attention import reference as short_reference
from fastft_kernels.window_attention import reference as window_reference
from fastft_kernels.window_grid import Grid
from torch import Tensor

from benchmarks.timing import time_device, time_host

WINDOW, SHIFT = (2, 6, 12), (1, 3, 6)
# Grid and heads of each stage, for 721 x 1440 points in patches of 4.
STAGES = (((4, 180, 360), 8), ((4, 90, 180), 16), ((4, 45, 90), 32))
PATCHES, INNER = 16_200, 16
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16


@dataclass(frozen=True)
class AttentionCase:
    """An op, its reference, shapes of its inputs and output, and the rest of its arguments."""

    what: dict[str, Any]
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    rest: tuple[Any, ...]


def cases() -> Iterator[AttentionCase]:
    """Each stage of the backbone with and without a shift, then decoder and encoder."""
    for size, heads in STAGES:
        for shift in ((0, 0, 0), SHIFT):
            padded = Grid(size, WINDOW, shift).padded
            yield AttentionCase(
                {"op": "window_attention", "size": size, "heads": heads, "shifted": any(shift)},
                window_attention,
                window_reference,
                ((1, *padded, 3 * heads * 64),),
                (1, *size, heads * 64),
                (heads, size, WINDOW, shift),
            )
    for queries, keys in ((13, 3), (3, 13)):
        yield AttentionCase(
            {"op": "short_attention", "samples": PATCHES, "queries": queries, "keys": keys},
            short_attention,
            short_reference,
            ((1, queries, INNER * 64), (PATCHES, keys, 2 * INNER * 64)),
            (PATCHES, queries, INNER * 64),
            (INNER,),
        )


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


def bench_attention(records: Any) -> None:
    """Forward and backward of every case."""
    for case in cases():
        torch.manual_seed(0)
        inputs = [torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in case.inputs]
        dy = torch.randn(case.output, device=DEVICE, dtype=DTYPE)
        check(case, inputs, dy)
        torch._dynamo.reset()
        compiled = torch.compile(case.reference, fullgraph=True, dynamic=False)
        providers = {"fastft": case.op, "torch": case.reference, "torch.compile": compiled}
        for provider, function in providers.items():
            measure(records, {**case.what, "provider": provider}, case, function, inputs, dy)
        torch.cuda.empty_cache()


def measure(
    records: Any,
    what: dict[str, Any],
    case: AttentionCase,
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    dy: Tensor,
) -> None:
    """One provider's records."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    read = 2 * sum(x.numel() for x in inputs)

    def forward() -> Tensor:
        return function(*leaves, *case.rest)

    y = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    for direction, call, moved in (
        ("forward", forward, read + 2 * dy.numel()),
        ("backward", backward, 2 * read + 2 * dy.numel()),
    ):
        host, timing = time_host(call), time_device(call, repeats=10)
        records.add({**what, "direction": direction}, timing, moved, host_us=host)
