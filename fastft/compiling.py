"""torch.compile as fastft uses it: what is inside, what varies, what a partitioner may keep."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from fastft.errors import ConfigError
from fastft.precision import Precision

Forward = Callable[..., Any]


def compiled(
    forward: Forward,
    precision: Precision,
    dynamic: bool | Literal["first"] | None = None,
    *,
    differentiates: bool = False,
    fullgraph: bool = True,
    backend: Any = "inductor",
) -> Forward:
    """`torch.compile` of a forward with its autocast inside.

    Around it, torch 2.11 would run the compiled backward under autocast too, unlike eager (pytorch
    issue 153044).

    Args:
        dynamic: see `Block`; None: torch decides.
        differentiates: see `Block`.
    """
    cast(Any, functorch_config).backward_pass_autocast = "off"

    def run(*arguments: Any, **keywords: Any) -> Any:
        with precision.autocast():
            return forward(*arguments, **keywords)

    function = torch.compile(run, dynamic=dynamic and True, fullgraph=fullgraph, backend=backend)
    if differentiates:
        function = _traces_derivatives(function)
    return _first_axes_vary(function) if dynamic == "first" else function


def _traces_derivatives(function: Forward) -> Forward:
    """Dynamo traces `torch.autograd.grad`, with the model's floats as constants: else it finds late
    that it must, and traces all of it again. Set for each call, since other models need neither."""
    dynamo = cast(Any, importlib.import_module("torch._dynamo.config"))
    return dynamo.patch(trace_autograd_ops=True, specialize_float=True)(function)


def _first_axes_vary(function: Forward) -> Forward:
    """Sizes of tensors' other axes are constants of what is compiled, which saves half of the time
    that it takes, and is faster.

    Inductor fuses sums over rows with sums over columns where they are large, which would make one
    graph for large batches and one for small ones.
    """
    inductor = cast(Any, importlib.import_module("torch._inductor.config"))
    function = inductor.patch({"triton.mix_order_reduction": False})(function)

    def run(*arguments: Any, **keywords: Any) -> Any:
        for leaf in tree_leaves((arguments, keywords)):
            if isinstance(leaf, Tensor):
                cast(Any, torch._dynamo).mark_static(leaf, list(range(1, leaf.ndim)))
        return function(*arguments, **keywords)

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


@contextlib.contextmanager
def recompile_limit_explained() -> Iterator[None]:
    """Says what to change where something is compiled again and again.

    Raises:
        ConfigError: instead of torch's error.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":
            raise
        limit = cast(Any, importlib.import_module("torch._dynamo.config")).recompile_limit
        raise ConfigError(
            f"step.compile: what is compiled must serve many steps; it has {limit} graphs and needs"
            " more, for the reasons above; change the code that they name, or set step.compile ="
            " 'off'"
        ) from error


@functools.cache
def backend_keeping(share: float) -> Callable[..., Any]:
    """Inductor with a partitioner that keeps at most this share; one object per share, because
    Dynamo tells compiled graphs of one code object apart by their backend."""

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        inductor = cast(Any, importlib.import_module("torch._inductor.compile_fx"))
        passes = importlib.import_module("torch._inductor.custom_graph_pass")

        class Pass(passes.CustomGraphPass):
            def __call__(self, graph: Any) -> None:
                _keep_random_numbers(graph)

            def uuid(self) -> str:
                return "fastft: random numbers are kept, 1"

        with (
            cast(Any, functorch_config).patch(activation_memory_budget=share),
            inductor.config.patch(joint_custom_post_pass=Pass()),
        ):
            return inductor.compile_fx(graph, inputs, **options)

    return backend


def _keep_random_numbers(graph: Any) -> None:
    """Below a full budget torch 2.11's partitioner may draw them anew in the backward pass, which
    makes gradients wrong without a word (pytorch issues 190717, 190758)."""
    for node in graph.nodes:
        if node.op == "call_function" and draws_numbers(node.target, node.args, node.kwargs):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def draws_numbers(operator: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether a call takes random numbers; attention does only where it has dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
        return False
    names = [argument.name for argument in operator._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return bool(arguments[place] if place < len(arguments) else keywords.get("dropout_p", 0.0))
