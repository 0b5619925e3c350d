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


def make_precision(name: str, device: torch.device, *, tf32: bool = False) -> Precision:
    """Resolves 'auto' and switches TF32 matrix products on or off.

    Args:
        tf32: `step.tf32`, for products that autocast leaves in float32.

    Raises:
        ConfigError: the device has no TF32, or there is no autocast to leave.
    """
    if name == "auto":
        gpu_has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if gpu_has_bf16 else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ConfigError("step.precision: 'tf32' needs a GPU; got a CPU; use 'fp32' or 'auto'")
    if tf32 and (name not in _AUTOCAST or device.type != "cuda"):
        raise ConfigError(
            f"step.tf32: needs a GPU and step.precision 'bf16' or 'fp16'; got '{name}' on"
            f" {device.type}; remove it, or set step.precision = 'tf32'"
        )
    tf32 = tf32 or name == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    return Precision(name, device)
