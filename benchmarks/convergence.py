"""Fine-tunes a small transformer with every state layout of FusedAdam and with torch AdamW.

Real data: scikit-learn's handwritten digits (1,797 images of 8 x 8). Pretrained on digits 0 to 4,
fine-tuned on all ten with layer-wise learning rates and clipping; three seeds. Runs on the CPU
path, whose arithmetic and rounding are the kernels'.
Usage: python -m benchmarks.convergence OUT.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from fastft_kernels import FusedAdam, GradientNorm
from sklearn.datasets import load_digits
from torch import Tensor, nn

STEPS, BATCH = 600, 64
LAYOUTS: tuple[Any, ...] = ("torch", "fp32", "bf16", "8bit")


class Classifier(nn.Module):
    """Rows of an image as tokens; 0.1 million parameters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 8, 8] to [B, 10]."""
        return self.head(self.blocks(self.embed(x) + self.position).mean(1))


def groups(model: Classifier, lr: float) -> list[dict[str, Any]]:
    """Layer-wise decay: the head fastest."""
    parts: list[Any] = [model.embed, *model.blocks.layers, model.head]
    found = [{"params": list(m.parameters()), "lr": lr * 0.8**i} for i, m in enumerate(parts[::-1])]
    return [*found, {"params": [model.position], "lr": lr * 0.8**4}]


def train(model: Classifier, data: tuple[Tensor, Tensor], layout: Any, seed: int) -> list[float]:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.05}
    chosen = groups(model, 1e-3)
    bases = [group["lr"] for group in chosen]
    optimizer: Any = (
        torch.optim.AdamW(chosen, **options)
        if layout == "torch"
        else FusedAdam(chosen, **options, state_layout=layout, seed=seed)
    )
    parameters, norm, losses = list(model.parameters()), GradientNorm(max_norm=1.0), []
    images, labels = data
    for step in range(STEPS):
        rate = min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * rate
        pick = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[pick]), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        if layout == "torch":
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        else:
            result = norm([p.grad for p in parameters])
            optimizer.step(grad_divisor=result.grad_divisor, skip=result.skip)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def evaluate(model: Classifier, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    scores = model(data[0])
    loss = nn.functional.cross_entropy(scores, data[1])
    return loss.item(), (scores.argmax(1) == data[1]).float().mean().item()


def main() -> None:
    """One line per layout and seed: the loss curve in tenths, held-out loss and accuracy."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    learn, held = order[:1400], order[1400:]
    few = learn[labels[learn] < 5]
    torch.manual_seed(0)
    start = Classifier()
    train(start, (images[few], labels[few]), "torch", 0)
    with Path(sys.argv[1]).open("w") as file:
        for layout in LAYOUTS:
            for seed in range(3):
                model = Classifier()
                model.load_state_dict(start.state_dict())
                losses = train(model, (images[learn], labels[learn]), layout, seed)
                loss, accuracy = evaluate(model, (images[held], labels[held]))
                tenth = STEPS // 10
                curve = [
                    round(sum(losses[i : i + tenth]) / tenth, 4) for i in range(0, STEPS, tenth)
                ]
                record = {"state": layout, "seed": seed, "held_out_loss": round(loss, 4)}
                record |= {"held_out_accuracy": round(accuracy, 4), "train_loss_tenths": curve}
                file.write(json.dumps(record) + "\n")
                print(record, flush=True)


if __name__ == "__main__":
    main()
