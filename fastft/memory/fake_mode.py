"""Fake tensors with less Python per operator than torch's mode takes; what comes out is alike."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

# What operators take beside tensors, and lists.
_PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class NothingCompiled:
    """Of a mode: without torch's wrapper that keeps the compiler out, which takes time."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class FakeMode(NothingCompiled, FakeTensorMode):
    """For tensors whose sizes are numbers, where nothing is compiled.

    Real tensors that an operator is given become fake there.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Views by torch's kernels, in a third of the time; the rest as torch does it."""
        kwargs = kwargs or {}
        if not (_only_views(func) and self._knows(args[0])):
            return self.dispatch(func, types, args, kwargs)
        with in_kernel_invocation_manager(self):
            views = func(*args, **kwargs)
        device = args[0].device
        if isinstance(views, Tensor):
            return FakeTensor(self, views, device)
        return [FakeTensor(self, view, device) for view in views]

    def _validate_cache_key(self, func: Any, args: Any, kwargs: Any) -> None:
        # torch remembers no custom operator; what fastft's return depends on shapes and types only.
        if func.namespace != "fastft":
            super()._validate_cache_key(func, args, kwargs)

    def _prep_args_for_hash(
        self, result: list[object], args: Any, state: Any, id_hashed_objects: list[object]
    ) -> None:
        """What results are remembered by; making torch's key takes half of an operator's time."""
        values = [*args, *args.values()] if isinstance(args, dict) else args
        for x in values:
            if self._knows(x):
                result += (x.shape, x.stride(), x.storage_offset(), x.dtype, x.device)
                result += (x.requires_grad, x.is_conj(), x.is_neg())
            elif isinstance(x, list | tuple):
                result += (type(x), len(x))
                self._prep_args_for_hash(result, x, state, id_hashed_objects)
            elif isinstance(x, _PLAIN):
                result += (type(x), x)
            else:
                super()._prep_args_for_hash(result, (x,), state, id_hashed_objects)

    def _knows(self, value: Any) -> bool:
        return (
            type(value) is FakeTensor
            and value.fake_mode is self
            and value.constant is None
            and value.layout == torch.strided
        )


@functools.cache
def _only_views(func: Any) -> bool:
    """Whether an operator makes views, has a kernel for it, and never copies, as `to` may."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return func is torch.ops.aten._unsafe_view.default or (
        func.is_view and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)
    )
