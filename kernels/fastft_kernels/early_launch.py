"""Programmatic dependent launch: a kernel is set up while the one ahead of it still runs.

Between two short kernels a GPU otherwise idles for about a microsecond. A kernel that takes part
calls `wait_for_previous` before it touches memory, and `let_next_start` once its loads are on their
way: a later call measured slower. On devices without it, neither does anything.
Source: CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Until all kernels ahead have ended and what they wrote is visible."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """The next kernel may be set up, once every program has called this or ended."""
    if EARLY:
        gdc_launch_dependents()


def early_launch(device: torch.device) -> dict[str, Any]:
    """The constant EARLY and the option of a launch on the device: compute capability 9.0 on."""
    return {"EARLY": True, "launch_pdl": True} if _can_start_early(device) else {"EARLY": False}


@functools.cache
def _can_start_early(device: torch.device) -> bool:
    # ROCm has other numbers, and no such launch; the interpreter knows no such instruction.
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and not knobs.runtime.interpret
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
