"""Ops as custom ops where something must see them, as plain calls where nothing does.

The dispatcher and the Python around a custom op take the host longer than the kernels run
(benchmarks/LOG.md), so an eager step would wait for them.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastft_kernels.device import runs_triton, transformed


def as_op(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The function, registered as a custom op under the name and called as one where needed."""
    op = torch.library.custom_op(name, function, mutates_args=())
    op.register_fake(fake)

    def call(*arguments: Any) -> Any:
        return function(*arguments) if _unseen(arguments[0]) else op(*arguments)

    return call


def as_differentiable_op(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """`as_op` with a backward; the plain call is an autograd function of the same two parts."""
    op = torch.library.custom_op(name, function, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)
    parts = {"forward": function, "setup_context": setup_context, "backward": backward}
    kind = type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in parts.items()})

    def call(*arguments: Any) -> Any:
        return kind.apply(*arguments) if _unseen(arguments[0]) else op(*arguments)

    return call


def _unseen(x: torch.Tensor) -> bool:
    """Whether no graph is traced and no mode watches: fake tensors, selective checkpointing."""
    return (
        runs_triton(x)
        and not torch.compiler.is_compiling()
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
    )
