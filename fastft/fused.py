"""Which of fastft's kernels a run uses, and why not the others.

They are the default on a GPU. Elsewhere torch's own optimizers and norms run, except for what torch
does not have (moments in fewer bits, ZClip), which the kernels' plain-torch paths compute.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from fastft_kernels import use_fused_layer_norm
from fastft_kernels.device import FLOAT_DTYPES
from torch import nn

from fastft.config import RunConfig
from fastft.errors import ConfigError
from fastft.task import Task


@dataclass(frozen=True)
class Kernels:
    """The choice for one run.

    Attributes:
        adam: update with `FusedAdam` instead of torch's optimizer.
        norm: measure gradients with `GradientNorm` instead of torch's foreach norms.
        notes: what a user would expect to be used and is not, with the reason.
    """

    adam: bool = False
    norm: bool = False
    notes: tuple[str, ...] = ()


TORCH_ONLY = Kernels()


def choose_kernels(
    config: RunConfig, parameters: Iterable[nn.Parameter], device: torch.device
) -> Kernels:
    """Adam and gradient norm: on a GPU wherever they can, elsewhere only where torch cannot.

    Raises:
        ConfigError: a setting needs a kernel that cannot take these parameters.
    """
    is_adam = config.optim.name in ("adam", "adamw")
    needs_adam = config.optim.moments != "fp32"
    needs_norm = config.gradients.zclip is not None
    wanted = config.step.kernels == "auto" and device.type == "cuda"
    reason = _obstacle(parameters)
    if reason is None:
        return Kernels(adam=is_adam and (wanted or needs_adam), norm=wanted or needs_norm)
    needing = {
        f"optim.moments: '{config.optim.moments}'": needs_adam,
        "gradients.zclip:": needs_norm,
    }
    problems = [
        f"{setting} needs parameters that fastft's kernels take; {reason}; drop the setting"
        for setting, needed in needing.items()
        if needed
    ]
    if problems:
        raise ConfigError(problems)
    notes = (f"optimizer and gradient norm: torch's own, because {reason}",) if wanted else ()
    return Kernels(notes=notes)


def _obstacle(parameters: Iterable[nn.Parameter]) -> str | None:
    for parameter in parameters:
        if hasattr(parameter, "to_local"):
            return "some are sharded"
        if parameter.dtype not in FLOAT_DTYPES:
            return f"some are {str(parameter.dtype).removeprefix('torch.')}"
    return None


def fuse_layer_norms(task: Task, config: RunConfig, device: torch.device) -> str | None:
    """Swaps in the fused layer norm as `step.layer_norm` says; returns what to tell the user.

    'auto' swaps on a GPU where nothing is compiled. In a compiled block our op cannot be fused with
    its neighbours, and each call took the host 0.1 ms or more on the one machine measured: steps of
    a ViT-B/16 went from 42.7 to 53.4 ms. Those of a decoder 3,200 wide, at 4,096 rows, went from
    30.8 to 30.1 ms. So 'auto' leaves compiled blocks alone, and 'fused' is there to try
    (benchmarks/LOG.md). So it does where the loss differentiates the model: the norm's backward is
    then plain torch, and not measured.
    """
    mode = config.step.layer_norm
    if mode == "auto":
        eager = config.step.compile == "off" and not task.double_backward
        mode = "fused" if device.type == "cuda" and eager else "torch"
    if mode == "torch":
        return None
    report = use_fused_layer_norm(task.model, alike=tuple(task.layer_norms))
    wanted = config.step.layer_norm == "fused"
    return str(report) if wanted or report.swapped or report.kept else None
