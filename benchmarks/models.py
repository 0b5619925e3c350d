"""What benchmarks train: a GPT-like decoder, data that can be learned, the trainer's own step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from timm.layers.norm import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from fastft.assemble import build_step
from fastft.blocks import BlockForwards
from fastft.config import GradientsConfig, OptimConfig, RunConfig
from fastft.runfile import parse
from fastft.step import TrainingStep
from fastft.task import Batch, Loss, Task, repeated_blocks


class DecoderBlock(nn.Module):
    """Pre-norm attention and MLP, as in GPT-2 (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, width]` in and out."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Next-token logits `[B, L, vocabulary]` from tokens `[B, L]`."""

    def __init__(self, *, width: int, layers: int, heads: int, vocabulary: int, length: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Causal language model."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def markov_tokens(
    batches: int, batch: int, length: int, vocabulary: int, device: torch.device, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """(tokens, next tokens) `[batch, length]` of a random chain: each token has four successors."""
    chain = torch.Generator(device).manual_seed(0)
    successors = torch.randint(vocabulary, (vocabulary, 4), generator=chain, device=device)
    draw = torch.Generator(device).manual_seed(seed)
    tokens = torch.randint(vocabulary, (batches * batch,), generator=draw, device=device)
    rows = [tokens]
    for _ in range(length):
        choice = torch.randint(4, tokens.shape, generator=draw, device=device)
        tokens = successors[tokens, choice]
        rows.append(tokens)
    sequences = torch.stack(rows, 1).view(batches, batch, length + 1)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in sequences]


def prototype_images(
    batches: int, batch: int, classes: int, device: torch.device, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """(images `[batch, 3, 224, 224]`, classes): a coarse pattern per class under strong noise."""
    fixed = torch.Generator(device).manual_seed(0)
    patterns = torch.randn(classes, 3, 14, 14, generator=fixed, device=device)
    draw = torch.Generator(device).manual_seed(seed)
    found = []
    for _ in range(batches):
        targets = torch.randint(classes, (batch,), generator=draw, device=device)
        clean = F.interpolate(patterns[targets], size=(224, 224), mode="nearest")
        noise = torch.randn(clean.shape, generator=draw, device=device)
        found.append((0.5 * clean + noise, targets))
    return found


def classifier_task(make_model: Callable[[], nn.Module], device: torch.device, seed: int) -> Task:
    """A model that maps 'inputs' to logits of 'targets', its weights drawn from the seed."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = make_model()

    def loss(model: nn.Module, batch: Batch) -> Loss:
        logits = model(batch["inputs"])
        return Loss(F.cross_entropy(logits.flatten(0, -2), batch["targets"].flatten()), {})

    return Task(model, loss, repeated_blocks(model), layer_norms=(LayerNorm,))


def classifier_batch(pair: tuple[Tensor, Tensor]) -> Batch:
    """(inputs, targets) as `classifier_task` takes them."""
    return Batch({"inputs": pair[0], "targets": pair[1]}, len(pair[0]))


def trainer_step(
    task: Task, device: torch.device, optim: OptimConfig, clip_norm: float, **step: str | bool
) -> tuple[TrainingStep, BlockForwards]:
    """The step of `fastft train` over a task, and how its blocks run.

    Args:
        step: the run file's `[step]`.
    """
    tree: dict[str, Any] = {
        "run": {"folder": "none", "steps": 10_000},
        "model": {"adapter": "timm", "options": {"name": "none", "num_classes": 1}},
        "data": {"train": [{"path": "none"}], "batch_size": 1},
        "optim": {"lr": optim.lr},
        "step": step,
    }
    config = replace(
        parse(RunConfig, tree, where="benchmark"),
        optim=optim,
        gradients=GradientsConfig(clip_norm=clip_norm),
    )
    return build_step(config, task, device, Console(width=150))
