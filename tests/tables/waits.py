"""Where code waits for the device, seen on a CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


class Waits(TorchDispatchMode):
    """Notes reads of values, which all tensors count as the device's, and blocking copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._copies = _Copies(self.found)

    def __enter__(self) -> "Waits":
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """`torch.tensor` with a device, and `.cpu()`; both would copy, and wait, on a GPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func is torch.tensor and kwargs.get("device") is not None
        if made or func in (torch.Tensor.cpu, torch.Tensor.new_tensor):
            self.found.append(func.__name__)
        return func(*args, **kwargs)
