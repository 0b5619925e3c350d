"""What the message of a plan that does not fit says of several GPUs."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from fastft.config import OptimConfig
from fastft.memory.budget import GIB, nothing_fits
from fastft.memory.solve import BlockCosts, Choice, StepCosts, smallest_peak
from fastft.task import Batch, Block, Loss, Task


def test_more_gpus_are_advice_where_they_suffice() -> None:
    """Four blocks and a head of 1 GiB each: 5 GiB of weights, 10 of Adam's state, 5 of gradients.

    On n GPUs, 15 / n lie there, and 1 + 3 are gathered; 4 / n of the gradients are behind the first
    block's backward, which takes 2. On one GPU it ends with 15 + 4 + 2 = 21.
    """
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2**14, 2**14, bias=False) for _ in range(5)))
    blocks = tuple(Block(name, layer) for name, layer in list(model.named_children())[:4])
    one = Task(model, lambda model, batch: Loss(torch.zeros(())), blocks)
    parameters = dict(model.named_parameters())
    optimizer = SimpleNamespace(parameters=parameters, config=OptimConfig(lr=1.0))
    step = cast(Any, SimpleNamespace(task=one, optimizer=optimizer))
    way = Choice("recompute all", 0, 0, 2 * GIB, 1.0)
    costs = StepCosts(
        blocks=tuple(BlockCosts(block.name, (way,), GIB) for block in blocks),
        fixed_bytes=15 * GIB,
        before_bytes=0,
        before_backward_bytes=0,
        tail_bytes=GIB,
        tail_gradient_bytes=GIB,
        update_bytes=0,
        other_seconds=0.0,
    )

    def said(limit: float, costs: StepCosts = costs, batches: int = 1) -> list[str]:
        lines = nothing_fits(step, costs, [Batch({}, 8)] * batches, round(limit * GIB))
        return [line for line in lines if line.startswith("sharding")]

    assert smallest_peak(costs)[0] == 21 * GIB
    (line,) = said(16)
    assert line == (
        "sharding: weights, gradients and the optimizer's state split over 2 GPUs or more (FSDP)"
        " would fit at this batch size on each, an estimated 15.5 GiB per GPU; fastft itself trains"
        " on one device so far"
    )
    assert "over 4 GPUs or more" in said(12)[0]
    assert "over 8 GPUs or more" in said(9)[0]
    assert said(8) == []
    # All gradients are there throughout from the second micro-batch on; a step that fits is none.
    several = replace(
        costs,
        blocks=tuple(replace(block, gradient_bytes=0) for block in costs.blocks),
        fixed_bytes=20 * GIB,
        tail_gradient_bytes=0,
    )
    assert "an estimated 16.0 GiB per GPU" in said(17, several, batches=2)[0]
    assert said(30) == []
