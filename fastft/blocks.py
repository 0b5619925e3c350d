"""How each block of a model runs: compiled or not, and what it keeps for its backward.

A block may keep everything that its backward needs, or less and compute the rest again. Eager
blocks say what they keep by operator (selective checkpointing), compiled ones by the share of bytes
that the partitioner may keep; both can keep only their inputs. What is kept may wait on the host.
Blocks that cannot be compiled run eagerly beside compiled ones.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastft.compiling import (
    Forward,
    allow_graphs,
    backend_keeping,
    compiled,
    draws_numbers,
)
from fastft.errors import ConfigError, PlanError
from fastft.offload import Host
from fastft.precision import Precision
from fastft.task import Block, Task

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "window_attention_forward",
    "short_attention_forward",
)
_NORMS = ("native_layer_norm", "native_batch_norm", "native_group_norm", "cudnn_batch_norm")
_NORMS += ("_softmax", "_safe_softmax", "_fused_rms_norm")
_FASTFT_NORMS = ("layer_norm_forward", "adaptive_norm_forward")


@dataclass(frozen=True)
class Way:
    """What a block keeps between its forward and its backward.

    Attributes:
        name: shown in tables and stored in plans.
        share: compiled blocks: of the bytes that a block keeps by default, how much it may keep.
        operators: eager blocks: whose outputs are kept; None: what autograd keeps.
        recompute: only the inputs are kept.
        offload: what is kept waits in the host's memory.
    """

    name: str
    share: float = 1.0
    operators: tuple[str, ...] | None = None
    recompute: bool = False
    offload: bool = False


KEEP = Way("keep all")
OFFLOAD = Way("keep all on the host", offload=True)
RECOMPUTE = Way("recompute all", recompute=True)
LEAST = Way("recompute all, inputs on the host", recompute=True, offload=True)
_OPERATORS = (
    Way("recompute pointwise", operators=_MATMULS + _ATTENTION + _NORMS + _FASTFT_NORMS),
    Way("recompute pointwise, attention", operators=_MATMULS + _NORMS + _FASTFT_NORMS),
    Way("keep matmuls", operators=_MATMULS),
)
_SHARES = tuple(Way(f"keep {share:.0%}", share=share) for share in (0.75, 0.5, 0.35, 0.2))
# Menus, from most kept on the device to least.
EAGER = (KEEP, *_OPERATORS, OFFLOAD, RECOMPUTE, LEAST)
COMPILED = (KEEP, *_SHARES, OFFLOAD, RECOMPUTE, LEAST)
_EVERY = (KEEP, *_SHARES, *_OPERATORS, OFFLOAD, RECOMPUTE, LEAST)


def ways(mode: str) -> tuple[Way, ...]:
    """The menu of blocks that may be compiled, for `step.compile` 'off' or 'blocks'."""
    return COMPILED if mode == "blocks" else EAGER


class BlockForwards:
    """Replaces the `forward` of a task's blocks, any number of times; names stay as they are.

    Without gradients, as in an evaluation, every block runs as if it kept everything.

    Args:
        task: its blocks' present forwards are the ones that run, whatever way is chosen.
        mode: `step.compile`, 'off' or 'blocks'.
        precision: autocast goes inside what is compiled (see `compiled`).

    Attributes:
        menus: block name -> the ways that it can run, by name.
        ways: those of all menus, by name; the last keeps the least.
        host: what the ways that offload share.

    Raises:
        ConfigError: blocks are to be compiled and the adapter names none that can be.
    """

    def __init__(self, task: Task, mode: str, precision: Precision) -> None:
        if mode == "blocks" and not task.compiled_blocks:
            raise ConfigError(
                "step.compile: 'blocks' needs a model with repeated blocks; the adapter names none;"
                " use 'model' or 'off'"
            )
        self.mode = mode
        self.menus = {
            block.name: {way.name: way for way in ways(mode if block.compile else "off")}
            for block in task.blocks
        }
        used = {name for menu in self.menus.values() for name in menu}
        self.ways = {way.name: way for way in _EVERY if way.name in used}
        self.chosen: dict[str, str] = {}
        self.host = Host(precision.device)
        self.blocks = {block.name: block for block in task.blocks}
        self._original = {block.name: _unbound(block.module) for block in task.blocks}
        self._made: dict[tuple[str, str], Forward] = {}
        self.precision = precision
        if mode == "blocks":
            allow_graphs(len(task.compiled_blocks) * len(COMPILED))

    def use(self, chosen: Mapping[str, str]) -> None:
        """Runs each named block the given way from now on.

        Args:
            chosen: block name -> name of a way.
        """
        for name, way in chosen.items():
            self.blocks[name].module.forward = self.forward(name, way)
            self.chosen[name] = way

    def use_everywhere(self, way: Way) -> None:
        """Runs every block the same way; one that is never compiled keeps all for any share."""
        self.use(dict.fromkeys(self.blocks, way.name))

    def forward(self, name: str, way: str) -> Forward:
        """A block's forward, run the given way."""
        # Bound, so that a deep copy of the module computes with the copy's weights.
        return types.MethodType(self._function(name, way), self.blocks[name].module)

    def _function(self, name: str, way: str) -> Forward:
        """`function(module, *arguments)`; made once."""
        key = (name, way)
        if key not in self._made:
            self._made[key] = self._make(self.blocks[name], self.ways[way])
        return self._made[key]

    def _make(self, block: Block, way: Way) -> Forward:
        forward = self._original[block.name]
        around = way.recompute or way.offload
        compiles = self.mode == "blocks" and block.compile
        if compiles and not around:
            backend = backend_keeping(way.share) if way.share < 1 else "inductor"
            forward = compiled(
                forward,
                self.precision,
                block.dynamic,
                differentiates=block.differentiates,
                backend=backend,
            )
        if way == KEEP:
            return forward
        keep = self._function(block.name, KEEP.name)
        if around and compiles:
            # No change of autocast's state around a compiled graph: it would be compiled again.
            forward = keep
        elif self.mode == "off" and block.compile:
            # The others are few. Over a roll-out, gradients of all calls add up in a held cast, so
            # without it the bits would not be those of keeping all.
            forward = functools.partial(_without_cast_cache, forward)
        if way.recompute or way.operators is not None:
            forward = _checkpointed(forward, way.operators)
        if way.offload:
            forward = self.host.offloaded(forward)

        def run(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            chosen = forward if torch.is_grad_enabled() else keep
            return chosen(module, *arguments, **keywords)

        return run


def _unbound(module: nn.Module) -> Forward:
    """The module's forward as a function that takes the module first."""
    forward = module.forward
    if getattr(forward, "__self__", None) is module:
        return cast(types.MethodType, forward).__func__
    return lambda _, *arguments, **keywords: forward(*arguments, **keywords)


def _checkpointed(forward: Forward, operators: tuple[str, ...] | None) -> Forward:
    """Runs `forward(module, ...)` again in the backward pass, but for the operators' outputs."""

    def run(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        def call(keywords: dict[str, Any], *arguments: Any) -> Any:
            return forward(module, *arguments, **keywords)

        # `checkpoint` has keywords of the same names. It must see all tensors: the random numbers
        # that it repeats are those of their devices.
        outputs = checkpoint(
            call,
            keywords,
            *arguments,
            use_reentrant=False,
            context_fn=functools.partial(_contexts, module, operators),
        )
        if operators is not None:
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(_refuse_second_derivatives)
        return outputs

    return run


def _without_cast_cache(forward: Forward, *arguments: Any, **keywords: Any) -> Any:
    """Autocast must not hold on to the weights it has cast until the forward pass ends."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return forward(*arguments, **keywords)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _contexts(module: nn.Module, operators: tuple[str, ...] | None) -> tuple[Any, Any]:
    """What the first and the second forward of a checkpointed block run in."""
    if operators is None:
        return contextlib.nullcontext(), _Recomputing(module, contextlib.nullcontext())

    def policy(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        kept = operator._schema.name.partition("::")[2] in operators
        # The second forward draws the same numbers only if it draws all of them.
        kept = kept and not draws_numbers(operator, arguments, keywords)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    first, again = create_selective_checkpoint_contexts(policy)
    return first, _Recomputing(module, again)


class _Recomputing:
    """A second forward, in which batch norms must not move their running statistics again."""

    def __init__(self, module: nn.Module, inner: contextlib.AbstractContextManager[Any]) -> None:
        self._module, self._inner = module, inner
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        buffers = running_statistics(self._module).values()
        self._kept = [(buffer, buffer.clone()) for buffer in buffers]
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        for buffer, old in self._kept:
            # Past the version counter: the norm may have saved the buffer for its backward.
            buffer.data.copy_(old)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of batch norms and their kin, by name."""
    kind = nn.modules.batchnorm._NormBase
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        if isinstance(module, kind)
        for name, buffer in module.named_buffers(recurse=False)
    }


def _refuse_second_derivatives(gradient: Tensor) -> None:
    # torch computes wrong ones here, without a word.
    if torch.is_grad_enabled():
        raise PlanError(
            "memory.plan: blocks that keep the outputs of some operators cannot be differentiated"
            " twice, as a loss on gradients does; make a new plan, or set memory.plan = 'off'"
        )


def compile_task(task: Task, mode: str, precision: Precision) -> BlockForwards:
    """Compiles the task's blocks, or its model, in place; parameter names stay as they are.

    Raises:
        ConfigError: compilation of what the loss differentiates, or does not run.
    """
    inside = any(block.differentiates for block in task.blocks)
    if inside and mode == "model":
        raise ConfigError(
            "step.compile: must be 'off' or 'blocks', since the loss runs a block of the model that"
            " differentiates itself, and not the model; got 'model'; set 'blocks'"
        )
    if task.double_backward and not inside and mode != "off":
        raise ConfigError(
            "step.compile: must be 'off', since the loss differentiates the model, and torch does"
            f" not differentiate what it compiled twice; got '{mode}'; remove it"
        )
    if mode == "model":
        allow_graphs(1)
        task.model.forward = compiled(task.model.forward, precision, fullgraph=False)
        # One graph leaves no block to choose for.
        return BlockForwards(dataclasses.replace(task, blocks=()), "off", precision)
    forwards = BlockForwards(task, mode, precision)
    if mode == "blocks":
        forwards.use_everywhere(KEEP)
    if inside:
        # What differentiates itself would do so again when it is recomputed: nothing to choose.
        return BlockForwards(dataclasses.replace(task, blocks=()), "off", precision)
    return forwards
