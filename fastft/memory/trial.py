"""One block alone: what it keeps, its highest forward and backward, and its time.

A block alone cannot hide the copies of what it puts on the host. Ways that offload are therefore
timed on chains of the block: as many forwards, then their backwards, last first. The first of these
backwards waits for its copy as a whole, so the time is an upper bound.
"""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastft.blocks import BlockForwards
from fastft.memory.meter import Meter
from fastft.memory.solve import Choice
from fastft.task import Block

_REPEATS = 2
# Blocks in the chain on which a way that offloads is timed.
_CHAIN = 3


class _End(torch.autograd.Function):
    """Behind a block's outputs: what makes the gradients that arrive at them, and holds nothing."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.like = [(y.shape, y.dtype, y.device) for y in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.full(n, 1e-3, dtype=t, device=d) for n, t, d in ctx.like)


@dataclass(frozen=True)
class Call:
    """What a block was called with: tensors detached, with their `requires_grad`.

    Attributes:
        times: calls per micro-batch.
        autocast: whether it was on around the call, and to what; None: as in the step.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    times: int = 1
    autocast: tuple[bool, torch.dtype] | None = None

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same inputs in a new graph; no leaves, which a block may not change in place."""
        return tree_map(_fresh, (self.arguments, self.keywords))


class Trial:
    """One block alone, one way.

    Args:
        call: what the block is called with.
    """

    def __init__(self, forwards: BlockForwards, block: Block, way: str, call: Call) -> None:
        self.way, self.host = way, forwards.host
        self.offloads = forwards.ways[way].offload
        self._parameters = list(block.module.parameters())
        self._forward, self._precision = forwards.forward(block.name, way), forwards.precision
        self._call = call

    def run_forward(self, inputs: tuple[Any, Any] | None = None) -> list[Tensor]:
        """Differentiable outputs, of fresh inputs where none are given."""
        arguments, keywords = self.fresh() if inputs is None else inputs
        # Entered for each call, as in a step: it caches the weights that it casts. A model may
        # change it around its blocks, and under another a compiled block is compiled again.
        with self._autocast():
            output = self._forward(*arguments, **keywords)
        return [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.requires_grad]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._call.autocast is None:
            return self._precision.autocast()
        enabled, dtype = self._call.autocast
        return torch.autocast(self._precision.device.type, dtype, enabled)

    def fresh(self) -> tuple[Any, Any]:
        """Inputs of a new graph; gradients as a step begins with."""
        self.drop_gradients()
        return self._call.fresh()

    def run_backward(self, outputs: list[Tensor]) -> None:
        """Makes the parameters' gradients; takes the outputs out of the list.

        In a step they are gone by then, but for what the block itself keeps, and nobody else holds
        the gradients that arrive.
        """
        if outputs:
            end = _End.apply(*outputs)
            outputs.clear()
            end.backward()

    def run(self) -> None:
        """Forward and backward; of a chain where the way offloads."""
        outputs = [self.run_forward() for _ in range(_CHAIN if self.offloads else 1)]
        while outputs:
            self.drop_gradients()
            self.run_backward(outputs.pop())

    def seconds(self, meter: Meter) -> float:
        """Of one forward and backward."""
        total = meter.seconds(self.run, _REPEATS, host_ahead=True)
        self.drop_gradients()
        return total / _CHAIN if self.offloads else total

    def drop_gradients(self) -> None:
        """As a step begins."""
        for parameter in self._parameters:
            parameter.grad = None


def measure_block(trial: Trial, meter: Meter) -> Choice:
    """Bytes kept, and the highest forward and backward; the time too, if the meter is steady.

    To be called in `long_lived_apart`.
    """
    if meter.steady:
        found: list[Choice] = []
        seconds = meter.seconds(lambda: found.append(_measured(trial, meter)), repeats=1)
        return replace(found[0], seconds=seconds)
    # The first compiles, libraries make their workspaces, and the host its buffers.
    trial.run()
    return _measured(trial, meter)


def _measured(trial: Trial, meter: Meter) -> Choice:
    """What one forward and backward take; the time is left at 0."""
    _set_apart()
    # The block before, whose copies come back while this one's backward runs.
    before = trial.run_forward() if trial.offloads else None
    inputs, there = trial.fresh(), trial.host.held_bytes
    meter.reset_peak()
    start = meter.allocated()
    outputs = trial.run_forward(inputs)
    del inputs
    kept, forward_bytes = meter.allocated() - start, meter.peak() - start
    host_bytes = trial.host.held_bytes - there
    meter.reset_peak()
    start = meter.allocated()
    trial.run_backward(outputs)
    backward_bytes = meter.peak() - start
    if before is not None:
        trial.run_backward(before)
    trial.drop_gradients()
    measured = (max(kept, 0), max(forward_bytes, 0), max(backward_bytes, 0))
    return Choice(trial.way, *measured, seconds=0.0, host_bytes=host_bytes)


@contextlib.contextmanager
def long_lived_apart() -> Iterator[None]:
    """In this context, collections of garbage leave out what blocks' trials have compiled.

    They come before each measurement, and a walk through all that a compiler leaves takes half a
    second. At the end everything is searched again, also what others had frozen, since gc thaws all
    or nothing: left frozen, cycles made here would hold their memory for good.
    """
    _set_apart()
    try:
        yield
    finally:
        gc.unfreeze()


def _set_apart() -> None:
    gc.collect()
    gc.freeze()


def detached(value: Any) -> Any:
    """A tensor out of its graph, with its `requires_grad`; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _fresh(value: Any) -> Any:
    value = detached(value)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    # A copy of a leaf is none. What was expanded stays so: a block is compiled anew for strides.
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in value.stride()]
    return value[tuple(once)].clone().expand(value.shape) if 0 in value.stride() else value.clone()
