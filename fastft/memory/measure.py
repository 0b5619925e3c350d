"""What a training step costs, measured with the run's own shapes.

A rehearsal is a whole training step whose update is told to change nothing. One of them, in which
every block keeps as little as it can, gives what is there besides the blocks; then each distinct
block runs alone, forward and backward (see `menu`).
"""

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastft.memory.meter import Meter
from fastft.memory.solve import BlockCosts, Choice, StepCosts, peak_bytes
from fastft.memory.trial import Call, detached
from fastft.step import TrainingStep, compute_loss
from fastft.task import Batch, Block, Task


@dataclass
class Rest:
    """Bytes of a step that are not its blocks', as in `StepCosts`, and its measured peak.

    Attributes:
        behind: block name -> for each of its calls in a forward pass that have a backward, what is
            allocated between its end and the next block's begin; less than 0 where its output goes.
    """

    fixed: int = 0
    before: int = 0
    before_backward: int = 0
    tail: int = 0
    tail_gradients: int = 0
    other_gradients: int = 0
    peak: int = 0
    seconds: float = 0.0
    behind: dict[str, list[int]] = field(default_factory=dict)


def rehearse(step: TrainingStep, batches: Sequence[Batch]) -> None:
    """One whole step that changes nothing."""
    with step.rehearsal():
        step(0, batches)


def update_seconds(step: TrainingStep, meter: Meter) -> float:
    """Time of the optimizer's update, whose work a rehearsal skips.

    Parameters stay as they are; the optimizer's state does not (see `Optimizer.forget`).
    """
    optimizer, device = step.optimizer, step.precision.device
    for parameter in optimizer.parameters.values():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    try:
        return meter.seconds(lambda: optimizer.update(0, one, zero, rate=0.0), repeats=3)
    finally:
        optimizer.zero_grad()


def differentiates_twice(step: TrainingStep, batches: Sequence[Batch]) -> bool:
    """Rehearses a step and tells whether its loss contains derivatives, as forces are."""
    found: list[bool] = []

    def watch(module: nn.Module, arguments: Any, output: Any) -> None:
        _on_gradient(output, lambda _: found.append(torch.is_grad_enabled()))

    handles = [block.module.register_forward_hook(watch) for block in step.task.blocks]
    try:
        rehearse(step, batches)
    finally:
        for handle in handles:
            handle.remove()
    return any(found)


def distinct_blocks(task: Task, calls: Mapping[str, Call]) -> dict[str, list[Block]]:
    """Blocks by what they are and what they are called with; those of one key cost the same."""
    found: dict[str, list[Block]] = {}
    for block in task.blocks:
        if block.name in calls:
            found.setdefault(_signature(block.module, calls[block.name]), []).append(block)
    return found


def capture_calls(step: TrainingStep, batch: Batch) -> dict[str, Call]:
    """Block name -> what it is called with; tensors are kept once per distinct block.

    Calls without gradients do not count. Of several, the first with differentiable inputs is taken:
    in a roll-out, a first block has none at its first call.
    """
    calls: dict[str, Call] = {}
    kept: dict[str, Call] = {}
    kind = step.precision.device.type

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if not torch.is_grad_enabled():
                return
            known = calls.get(name)
            times = known.times + 1 if known else 1
            if known is None or (
                not _differentiable((known.arguments, known.keywords))
                and _differentiable((arguments, keywords))
            ):
                around = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
                call = Call(*tree_map(detached, (arguments, keywords)), autocast=around)
                known = kept.setdefault(_signature(module, call), call)
            calls[name] = dataclasses.replace(known, times=times)

        return keep

    with contextlib.ExitStack() as stack:
        for block in step.task.blocks:
            handle = block.module.register_forward_pre_hook(hook(block.name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(step.rehearsal())
        compute_loss(step.task.loss, step.task.model, batch, step.precision)
    return calls


class _Marks:
    """Hooks before and behind the blocks that split a step's memory."""

    def __init__(self, step: TrainingStep, meter: Meter) -> None:
        self.rest, self._meter = Rest(fixed=meter.allocated()), meter
        self._outside = _outside(step)
        self._at: dict[str, int] = {}
        # The block that ended last, and what was allocated then.
        self._ended: tuple[str, int] | None = None

    def before(self, module: nn.Module, arguments: Any) -> None:
        if self._ended is not None:
            name, then = self._ended
            self.rest.behind[name][-1] = self._meter.allocated() - then
        self._ended = None

    def behind(self, name: str) -> Callable[..., None]:
        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            # Not of a later micro-batch, nor again in a backward pass.
            if "tail" not in self._at and torch.is_grad_enabled():
                self.rest.behind.setdefault(name, []).append(0)
                self._ended = name, self._meter.allocated()

        return after

    def before_first(self, module: nn.Module, arguments: Any) -> None:
        if "first" in self._at:
            # A later micro-batch: what its blocks take is not of the part before them.
            self.close()
            self._at.pop("stem", None)
        else:
            self._at["first"] = self._meter.allocated()
            self.rest.before = max(0, self._at["first"] - self.rest.fixed)
            _on_gradient(arguments, self.after_blocks)

    def after_last(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if "tail" not in self._at:
            # Of several calls in a micro-batch, the last stays.
            self._at["last"] = self._meter.allocated()
            self.close()
            _on_gradient(output, self.before_blocks)

    def before_blocks(self, gradient: Tensor) -> None:
        if "tail" in self._at:
            return
        self._ended = None
        self._at["tail"] = self._meter.peak()
        self.rest.tail = self._at["tail"] - self._at["last"]
        self.rest.tail_gradients = sum(p.grad.nbytes for p in self._outside if p.grad is not None)
        self.close()

    def after_blocks(self, gradient: Tensor) -> None:
        self.close()
        self._at["stem"] = self._meter.allocated() - gradient.nbytes

    def close(self) -> None:
        """Notes the peak so far and begins a new one."""
        highest = self._meter.peak()
        if "stem" in self._at:
            self.rest.before_backward = highest - self._at["stem"]
        self.rest.peak = max(self.rest.peak, highest)
        self._meter.reset_peak()


def measure_rest(step: TrainingStep, batches: Sequence[Batch], meter: Meter) -> Rest:
    """Rehearses a step with marks around the blocks; they should keep as little as they can."""
    gc.collect()
    meter.reset_peak()
    blocks, marks = step.task.blocks, _Marks(step, meter)
    handles = [
        blocks[0].module.register_forward_pre_hook(marks.before_first),
        blocks[-1].module.register_forward_hook(marks.after_last),
    ]
    for block in blocks:
        handles.append(block.module.register_forward_pre_hook(marks.before))
        handles.append(block.module.register_forward_hook(marks.behind(block.name)))
    try:
        if meter.steady:
            marks.rest.seconds = meter.seconds(lambda: rehearse(step, batches), repeats=1)
        else:
            rehearse(step, batches)
    finally:
        for handle in handles:
            handle.remove()
    marks.close()
    marks.rest.other_gradients = (
        sum(p.nbytes for p in _outside(step) if p.requires_grad) - marks.rest.tail_gradients
    )
    if not meter.steady:
        # Once around all: what a rehearsal begins and ends with makes the device wait.
        with step.rehearsal():
            marks.rest.seconds = meter.seconds(lambda: step(0, batches), repeats=3)
    return marks.rest


def assemble_costs(
    step: TrainingStep, rest: Rest, measured: Mapping[str, Mapping[str, Choice]], micro_batches: int
) -> StepCosts:
    """The whole step; what the model of its peak misses of the rehearsal is added to the rest.

    Args:
        measured: block name -> way -> cost; the last way is the one of the rehearsal.
        micro_batches: per step; from the second on, all gradients are there from the start.
    """
    several = micro_batches > 1
    blocks = tuple(
        BlockCosts(
            block.name,
            _in_step(rest, block.name, list(measured[block.name].values()), micro_batches),
            0 if several else sum(p.nbytes for p in block.module.parameters() if p.requires_grad),
        )
        for block in step.task.blocks
        if block.name in measured
    )
    all_gradients = sum(p.nbytes for p in step.optimizer.parameters.values() if p.requires_grad)
    frugal = math.fsum(block.choices[-1].seconds for block in blocks)
    costs = StepCosts(
        blocks=blocks,
        fixed_bytes=rest.fixed + (all_gradients if several else 0),
        before_bytes=rest.before,
        before_backward_bytes=rest.before_backward,
        tail_bytes=rest.tail,
        tail_gradient_bytes=0 if several else rest.tail_gradients,
        update_bytes=0 if several else rest.other_gradients,
        other_seconds=max(0.0, rest.seconds - frugal),
    )
    missed = rest.peak - peak_bytes(costs, [len(block.choices) - 1 for block in blocks])
    return dataclasses.replace(costs, fixed_bytes=max(0, costs.fixed_bytes + missed))


def _in_step(
    rest: Rest, name: str, choices: Sequence[Choice], micro_batches: int
) -> tuple[Choice, ...]:
    """With what is behind the block until its backward; that of the last call is gone by then.

    Where the rehearsal had inputs on the host, they went behind their block, when the caller
    dropped them: other ways keep them, and have those of a block before come back under their
    backward.
    """
    behind, fetched = rest.behind.get(name, [0]), choices[-1].host_bytes
    if fetched:
        behind = [max(0, size) for size in behind]
    return tuple(
        dataclasses.replace(
            choice,
            kept_bytes=max(0, choice.kept_bytes + sum(behind)),
            backward_bytes=max(0, choice.backward_bytes - max(0, behind[-1]))
            + (0 if choice.host_bytes else fetched),
            seconds=micro_batches * choice.seconds,
        )
        for choice in choices
    )


def _signature(module: nn.Module, call: Call) -> str:
    parameters = [
        (n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in module.named_parameters()
    ]
    inputs = [
        (tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, Tensor) else repr(x)
        for x in tree_leaves((call.arguments, call.keywords))
    ]
    # What is inside may differ where the parameters do not: a mask, an activation.
    inside = [type(m).__qualname__ for m in module.modules()]
    buffers = [(n, tuple(b.shape), b.dtype) for n, b in module.named_buffers()]
    return repr((inside, buffers, parameters, inputs, call.autocast))


def _on_gradient(values: Any, hook: Callable[[Tensor], None]) -> None:
    """Calls the hook once, when the first differentiable tensor gets its gradient."""
    for value in _differentiable(values)[:1]:
        value.register_hook(hook)


def _differentiable(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.requires_grad]


def _outside(step: TrainingStep) -> list[nn.Parameter]:
    inside = {id(p) for block in step.task.blocks for p in block.module.parameters()}
    return [p for p in step.optimizer.parameters.values() if id(p) not in inside]
