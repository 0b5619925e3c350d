"""Optimizers that are timed beside `FusedAdam`."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastft_kernels.adam_plan import StateLayout
from torch.optim import AdamW, Optimizer

Make = Callable[[list[Any]], Optimizer]

# Of the learning rate, by how much three steps may differ from torch's, on average: by an ulp each
# with moments in float32, by what rounding does in fewer bits.
LIMIT: dict[StateLayout, float] = {"fp32": 2e-3, "bf16": 0.01, "8bit": 0.1}


def adam_peers() -> Iterator[tuple[str, StateLayout, int, Make]]:
    """(name, state, number of groups, groups to optimizer)."""
    for groups in (1, 28, 300):
        yield "torch fused", "fp32", groups, functools.partial(AdamW, fused=True)
    yield "torch foreach", "fp32", 1, functools.partial(AdamW, foreach=True)
    if importlib.util.find_spec("bitsandbytes"):
        optim = importlib.import_module("bitsandbytes.optim")
        yield "bitsandbytes", "fp32", 1, optim.AdamW32bit
        yield "bitsandbytes", "8bit", 1, optim.AdamW8bit


def grouped(params: list[Any], count: int) -> list[dict[str, Any]]:
    """Groups with learning rates and weight decays of their own."""
    return [
        {"params": params[i::count], "lr": 1e-4 * 0.99**i, "weight_decay": 0.1 * (i % 2)}
        for i in range(count)
    ]


def adam_is_right(make: Make, layout: StateLayout) -> bool:
    """Whether its first steps differ from torch AdamW's by no more than the layout's rounding."""
    torch.manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (1, 63, 5000, 100_003)]
    wanted = [torch.nn.Parameter(p.detach().clone()) for p in found]
    pair = make(grouped(found, 2)), AdamW(grouped(wanted, 2))
    for _ in range(3):
        for p, q in zip(found, wanted, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in pair:
            optimizer.step()
    apart = torch.cat([(p - q).abs() for p, q in zip(found, wanted, strict=True)]).mean() / 1e-4
    return bool(apart <= LIMIT[layout])
