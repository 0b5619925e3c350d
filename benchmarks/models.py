"""The models and data that benchmarks train: a GPT-like decoder, and data that can be learned."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
