"""How each repeated block of a model runs: compiled or not, and what it keeps for its backward.

A block may keep everything that its backward needs, or less and compute the rest again. Eager
blocks say what they keep by operator (selective checkpointing), compiled ones by the share of bytes
that the partitioner may keep; both can keep only their inputs.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastft.errors import ConfigError
from fastft.precision import Precision
from fastft.task import Block, Task

Forward = Callable[..., Any]

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
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
    """

    name: str
    share: float = 1.0
    operators: tuple[str, ...] | None = None
    recompute: bool = False


KEEP = Way("keep all")
RECOMPUTE = Way("recompute all", recompute=True)
EAGER = (
    KEEP,
    Way("recompute pointwise", operators=_MATMULS + _ATTENTION + _NORMS + _FASTFT_NORMS),
    Way("recompute pointwise, attention", operators=_MATMULS + _NORMS + _FASTFT_NORMS),
    Way("keep matmuls", operators=_MATMULS),
    RECOMPUTE,
)
COMPILED = (KEEP, *(Way(f"keep {share:.0%}", share=share) for share in (0.75, 0.5, 0.35, 0.2)))
COMPILED += (RECOMPUTE,)


def ways(mode: str) -> tuple[Way, ...]:
    """The menu for `step.compile` 'off' or 'blocks', from most kept to least."""
    return COMPILED if mode == "blocks" else EAGER


class BlockForwards:
    """Replaces the `forward` of a task's blocks, any number of times; names stay as they are.

    Args:
        task: its blocks' present forwards are the ones that run, whatever way is chosen.
        mode: `step.compile`, 'off' or 'blocks'.
        precision: autocast goes inside what is compiled (see `compiled`).

    Raises:
        ConfigError: blocks are to be compiled and the adapter names none.
    """

    def __init__(self, task: Task, mode: str, precision: Precision) -> None:
        if mode == "blocks" and not task.blocks:
            raise ConfigError(
                "step.compile: 'blocks' needs a model with repeated blocks; the adapter names none;"
                " use 'model' or 'off'"
            )
        self.mode = mode
        self.ways = {way.name: way for way in ways(mode)}
        self.chosen: dict[str, str] = {}
        self.blocks = {block.name: block for block in task.blocks}
        self._original = {block.name: block.module.forward for block in task.blocks}
        self._made: dict[tuple[str, str], Forward] = {}
        self._precision = precision
        if mode == "blocks":
            allow_graphs(len(self.blocks) * len(self.ways))

    def use(self, chosen: Mapping[str, str]) -> None:
        """Runs each named block the given way from now on.

        Args:
            chosen: block name -> name of a way.
        """
        for name, way in chosen.items():
            self.blocks[name].module.forward = self.forward(name, way)
            self.chosen[name] = way

    def use_everywhere(self, way: Way) -> None:
        """Runs every block the same way."""
        self.use(dict.fromkeys(self.blocks, way.name))

    def forward(self, name: str, way_name: str) -> Forward:
        """A block's forward, run the given way; made once."""
        key = (name, way_name)
        if key not in self._made:
            self._made[key] = self._make(self.blocks[name], self.ways[way_name])
        return self._made[key]

    def _make(self, block: Block, way: Way) -> Forward:
        forward = self._original[block.name]
        if self.mode == "blocks":
            if way.recompute and (block.name, KEEP.name) in self._made:
                forward = self._made[block.name, KEEP.name]
            else:
                backend = _backend(way.share) if way.share < 1 else "inductor"
                forward = compiled(forward, self._precision, block.dynamic, backend=backend)
                if way.recompute:
                    self._made[block.name, KEEP.name] = forward
        else:
            forward = _without_cache(forward, self._precision) if way != KEEP else forward
        if way.recompute:
            return functools.partial(checkpoint, forward, use_reentrant=False)
        if way.operators is not None:
            keep = functools.partial(_selective, frozenset(way.operators))
            return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=keep)
        return forward


def compiled(
    forward: Forward,
    precision: Precision,
    dynamic: bool | None = None,
    *,
    fullgraph: bool = True,
    backend: Any = "inductor",
) -> Forward:
    """`torch.compile` of a forward with its autocast inside.

    Around it, torch 2.11 would run the compiled backward under autocast too, unlike eager (pytorch
    issue 153044).
    """
    cast(Any, functorch_config).backward_pass_autocast = "off"

    def run(*arguments: Any, **keywords: Any) -> Any:
        with precision.autocast():
            return forward(*arguments, **keywords)

    return torch.compile(run, dynamic=dynamic, fullgraph=fullgraph, backend=backend)


def _without_cache(forward: Forward, precision: Precision) -> Forward:
    """Autocast that does not hold on to the weights it has cast until the forward pass ends."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        with precision.autocast(cache=False):
            return forward(*arguments, **keywords)

    return run


def allow_graphs(count: int) -> None:
    """Raises Dynamo's limit for `count` blocks, in train and eval mode, and makes it an error.

    All blocks share one code object, and torch's limit is per code object. Past it torch would go
    on uncompiled, and say so only in a log.
    """
    # Here, because it takes a second to import.
    dynamo = cast(Any, importlib.import_module("torch._dynamo.config"))
    dynamo.recompile_limit = max(64, dynamo.recompile_limit, 8 * count)
    dynamo.accumulated_recompile_limit = max(
        dynamo.accumulated_recompile_limit, dynamo.recompile_limit
    )
    dynamo.fail_on_recompile_limit_hit = True


def compile_task(task: Task, mode: str, precision: Precision) -> BlockForwards:
    """Compiles the task's blocks, or its model, in place; parameter names stay as they are."""
    if mode == "model":
        allow_graphs(1)
        task.model.forward = compiled(task.model.forward, precision, fullgraph=False)
        # One graph leaves no block to choose for.
        return BlockForwards(dataclasses.replace(task, blocks=()), "off", precision)
    forwards = BlockForwards(task, mode, precision)
    if mode == "blocks":
        forwards.use_everywhere(KEEP)
    return forwards


@functools.cache
def _backend(share: float) -> Callable[..., Any]:
    """Inductor with a partitioner that keeps at most this share; one object per share, because
    Dynamo tells compiled graphs of one code object apart by their backend."""

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        inductor = importlib.import_module("torch._inductor.compile_fx")
        with cast(Any, functorch_config).patch(activation_memory_budget=share):
            return inductor.compile_fx(graph, inputs, **options)

    return backend


def _selective(keep: frozenset[str]) -> tuple[Any, Any]:
    def policy(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        name = operator._schema.name.partition("::")[2]
        return CheckpointPolicy.MUST_SAVE if name in keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
