"""How numbers are computed: fp32, TF32, or autocast to bf16 or fp16."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from fastft.errors import ConfigError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How numbers are computed.

    Attributes:
        name: 'fp32', 'tf32', 'bf16' or 'fp16'.
        device: what autocast is for.
    """

    name: str
    device: torch.device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to bf16 or fp16, or nothing."""
        dtype = _AUTOCAST.get(self.name)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


def make_precision(name: str, device: torch.device) -> Precision:
    """Resolves 'auto' and switches TF32 matrix products on or off.

    Raises:
        ConfigError: the device has no TF32.
    """
    if name == "auto":
        gpu_has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if gpu_has_bf16 else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ConfigError("step.precision: 'tf32' needs a GPU; got a CPU; use 'fp32' or 'auto'")
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return Precision(name, device)
