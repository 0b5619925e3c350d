"""Peaks that are predicted from blocks alone, beside those of whole steps, on fake tensors."""

from collections.abc import Callable

import pytest
import timm
import torch
from fake_step import CONFIG, make_fake_step
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from fastft.memory.fake import FakeMeter, estimate_costs, on_fake_tensors
from fastft.memory.measure import rehearse
from fastft.memory.plan import picked
from fastft.memory.solve import Solution, peak_bytes
from fastft.optim import state_bytes

SMALL = {"depths": (2, 2, 2, 2), "num_classes": 10, "drop_path_rate": 0.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "one stage": lambda: timm.create_model("vit_tiny_patch16_224", depth=4, img_size=112),
    "stages": lambda: SwinTransformer(
        img_size=112, embed_dim=48, num_heads=(2, 4, 8, 16), window_size=7, **SMALL
    ),
    "stages of convolutions": lambda: ConvNeXt(dims=(40, 80, 160, 320), **SMALL),
}


@pytest.mark.parametrize("name", MODELS)
def test_predicted_peaks_are_those_of_steps(name: str) -> None:
    model, meter = MODELS[name](), FakeMeter()
    with on_fake_tensors(meter) as mode:
        step, forwards, batches = make_fake_step(model, torch.zeros(16, 3, 112, 112), mode, meter)
        costs = estimate_costs(CONFIG, step, forwards, batches, meter)
        state = round(state_bytes(CONFIG.optim) * sum(p.numel() for p in model.parameters()))
        held = [torch.empty(state, dtype=torch.uint8)]
        last, count = len(costs.blocks[0].choices) - 1, len(costs.blocks)
        for picks in ([0] * count, [last] * count, [1] * count, [0, last] * (count // 2)):
            forwards.use(picked(costs, Solution(tuple(picks), 0, 0.0)))
            meter.reset_peak()
            rehearse(step, batches)
            assert peak_bytes(costs, picks) == pytest.approx(meter.peak(), rel=0.02)
        held.clear()
