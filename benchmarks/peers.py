"""What a user writes in plain PyTorch, to be timed beside fastft."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastft.config import OptimConfig
from fastft.optim import make_groups
from fastft.task import Task


class PlainStep:
    """bf16 autocast, AdamW and clip_grad_norm_ around a classifier.

    Args:
        task: inputs to logits; its model is changed in place.
        compiled: 'off', 'model', or 'blocks', each by itself.
        checkpointed: every block keeps only its inputs.
        fused: AdamW's fused form; otherwise what torch picks.
    """

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        clip_norm: float,
        *,
        compiled: str = "off",
        checkpointed: bool = False,
        fused: bool = True,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(group.parameters.values()), "weight_decay": group.weight_decay}
            for group in make_groups(task, optim, {})
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=optim.lr, fused=fused or None)
        self._parameters = [p for group in groups for p in group["params"]]
        self._clip_norm = clip_norm
        for block in task.blocks:
            forward = block.module.forward
            if compiled == "blocks":
                # Blocks of other sizes are other graphs, not one for all sizes.
                forward = torch.compile(forward, dynamic=False)
            if checkpointed:
                forward = functools.partial(checkpoint, forward, use_reentrant=False)
            block.module.forward = forward
        forward = functools.partial(_loss, task.model)
        self._forward = torch.compile(forward) if compiled == "model" else forward

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and the norm of its gradients, which it leaves clipped."""
        with torch.autocast(inputs.device.type, torch.bfloat16):
            loss = self._forward(inputs, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        return loss.detach(), norm

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step; the loss."""
        loss, _ = self.gradients(inputs, targets)
        self._optimizer.step()
        self.zero_grad()
        return loss


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
