"""Peaks that are predicted from blocks alone, beside those of whole steps, on fake tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from fastft.blocks import compile_task
from fastft.config import GradientsConfig, RunConfig
from fastft.memory.fake import FakeMeter, estimate_costs, fake_batch, make_fake, on_fake_tensors
from fastft.memory.measure import rehearse
from fastft.memory.plan import picked
from fastft.memory.solve import Solution, peak_bytes
from fastft.optim import Optimizer, make_groups, state_bytes
from fastft.precision import make_precision
from fastft.runfile import parse
from fastft.step import TrainingStep
from fastft.task import Batch, Loss, Task, repeated_blocks

CPU = torch.device("cpu")
RUN: dict[str, Any] = {
    "run": {"folder": "run", "steps": 2},
    "model": {"adapter": "python"},
    "data": {"batch_size": 16, "train": [{"path": "train.npz"}]},
    "optim": {"lr": 1e-2},
}
SMALL = {"depths": (2, 2, 2, 2), "num_classes": 10, "drop_path_rate": 0.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "one stage": lambda: timm.create_model("vit_tiny_patch16_224", depth=4, img_size=112),
    "stages": lambda: SwinTransformer(
        img_size=112, embed_dim=48, num_heads=(2, 4, 8, 16), window_size=7, **SMALL
    ),
    "stages of convolutions": lambda: ConvNeXt(dims=(40, 80, 160, 320), **SMALL),
}


def mean_square(model: nn.Module, batch: Batch) -> Loss:
    return Loss(model(batch["inputs"]).float().square().mean())


@pytest.mark.parametrize("name", MODELS)
def test_predicted_peaks_are_those_of_steps(name: str) -> None:
    config, model, meter = parse(RunConfig, RUN), MODELS[name](), FakeMeter()
    task = Task(model, mean_square, repeated_blocks(model))
    with on_fake_tensors(meter) as mode:
        make_fake(model, mode, meter)
        precision = make_precision("bf16", CPU)
        forwards = compile_task(task, "off", precision)
        optimizer = Optimizer(make_groups(task, config.optim, {}), config.optim, 2)
        step = TrainingStep(task, optimizer, None, GradientsConfig(), precision)
        batch = Batch({"inputs": torch.zeros(16, 3, 112, 112)}, 16)
        batches = [fake_batch(batch, mode, meter)]
        costs = estimate_costs(config, step, forwards, batches, meter)
        state = round(state_bytes(config.optim) * sum(p.numel() for p in model.parameters()))
        held = [torch.empty(state, dtype=torch.uint8)]
        last, count = len(costs.blocks[0].choices) - 1, len(costs.blocks)
        for picks in ([0] * count, [last] * count, [1] * count, [0, last] * (count // 2)):
            forwards.use(picked(costs, Solution(tuple(picks), 0, 0.0)))
            meter.reset_peak()
            rehearse(step, batches)
            assert peak_bytes(costs, picks) == pytest.approx(meter.peak(), rel=0.02)
        held.clear()
