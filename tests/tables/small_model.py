"""A residual block, a loss and batches for tests of single steps."""

import torch
from torch import nn

from fastft.task import Batch, Loss


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


def squared_error(model: nn.Module, batch: Batch) -> Loss:
    output = model(batch["inputs"])
    error = (output.float() - batch["targets"]).square().mean()
    return Loss(error, {"output": output.detach().float().mean()}, output.detach())


def make_batch(size: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 4, generator=generator)
    return Batch({"inputs": inputs, "targets": inputs.sum(1, keepdim=True)}, size)
