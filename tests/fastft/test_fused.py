"""Which kernels a run uses, and the layer norms that are swapped."""

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from fastft_kernels import FusedLayerNorm
from torch import nn

from fastft.adapters.timm import TimmAdapter, TimmOptions
from fastft.config import RunConfig
from fastft.errors import ConfigError
from fastft.fused import TORCH_ONLY, Kernels, choose_kernels, fuse_layer_norms
from fastft.runfile import parse
from fastft.task import Batch, Loss, Task

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL, NORM = Kernels(adam=True, norm=True), Kernels(norm=True)


def make_config(**sections: dict) -> RunConfig:
    tree = {
        "run": {"folder": "run", "steps": 10},
        "model": {"adapter": "timm"},
        "data": {"train": [{"path": "train.npz"}]},
        "optim": {"lr": 0.1},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse(RunConfig, tree)


def parameters(*dtypes: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OFF = {"step": {"kernels": "off"}}
SGD = {"optim": {"name": "sgd"}}
BITS = {"optim": {"moments": "8bit"}}
ZCLIP = {"gradients": {"zclip": {}}}


@pytest.mark.parametrize(
    ("sections", "dtypes", "device", "expected"),
    [
        ({}, [F32], CUDA, ALL),
        ({}, [F32, BF16, F16], CUDA, ALL),
        ({"optim": {"name": "adam"}}, [F32], CUDA, ALL),
        (SGD, [F32], CUDA, NORM),
        ({"optim": {"name": "rmsprop"}}, [F32], CUDA, NORM),
        (OFF, [F32], CUDA, TORCH_ONLY),
        ({}, [F32], CPU, TORCH_ONLY),
        (BITS, [F32], CPU, Kernels(adam=True)),
        (BITS, [F32], CUDA, ALL),
        (ZCLIP, [F32], CPU, NORM),
        ({**SGD, **ZCLIP}, [F32], CPU, NORM),
        ({**BITS, **ZCLIP}, [BF16], CPU, ALL),
        ({}, [F64], CPU, TORCH_ONLY),
        (OFF, [F64], CUDA, TORCH_ONLY),
    ],
    ids=str,
)
def test_choice(
    sections: dict, dtypes: Sequence[torch.dtype], device: torch.device, expected: Kernels
) -> None:
    assert choose_kernels(make_config(**sections), parameters(*dtypes), device) == expected


def test_what_cannot_use_them_says_so_on_a_gpu() -> None:
    found = choose_kernels(make_config(), parameters(F32, F64), CUDA)
    note = "optimizer and gradient norm: torch's own, because some are float64"
    assert found == Kernels(notes=(note,))
    sharded = parameters(F32)
    sharded[0].to_local = None  # pyright: ignore[reportAttributeAccessIssue]
    (note,) = choose_kernels(make_config(), sharded, CUDA).notes
    assert note.endswith("because some are sharded")


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_what_needs_them_is_refused_without(device: torch.device) -> None:
    """Every setting that does, in one go."""
    with pytest.raises(ConfigError) as caught:
        choose_kernels(make_config(**BITS, **ZCLIP), parameters(F64), device)
    rest = "needs parameters that fastft's kernels take; some are float64; drop the setting"
    assert caught.value.problems == (f"optim.moments: '8bit' {rest}", f"gradients.zclip: {rest}")


def make_task() -> Task:
    torch.manual_seed(0)
    arguments = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    options = TimmOptions(
        name="vit_tiny_patch16_224", num_classes=3, img_size=16, arguments=arguments
    )

    def loss(predictions, fields) -> Loss:
        return Loss(nn.functional.cross_entropy(predictions, fields["targets"]))

    return TimmAdapter(options).build(loss, device=CPU, checkpoint=None, pretrained=False)


@pytest.mark.usefixtures("kernel_path")
def test_the_fused_norm_computes_what_timms_does() -> None:
    plain = make_task()
    fused = copy.deepcopy(plain)
    said = fuse_layer_norms(fused, make_config(step={"layer_norm": "fused"}), CPU)
    # Two per block, and the last one.
    assert said == "fused layer norm: 5 swapped, 0 kept"
    assert sum(isinstance(module, FusedLayerNorm) for module in fused.model.modules()) == 5
    assert list(fused.model.state_dict()) == list(plain.model.state_dict())
    batch = Batch({"inputs": torch.randn(4, 3, 16, 16), "targets": torch.tensor([0, 1, 2, 0])}, 4)
    losses = [task.loss(task.model, batch).total for task in (plain, fused)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.model.parameters(), fused.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "device", "is_fused"),
    [
        ({}, CUDA, True),
        ({"compile": "blocks"}, CUDA, False),
        ({"compile": "blocks", "layer_norm": "fused"}, CUDA, True),
        ({"layer_norm": "torch"}, CUDA, False),
        ({}, CPU, False),
        ({"layer_norm": "fused"}, CPU, True),
        ({"kernels": "off"}, CUDA, True),
    ],
    ids=str,
)
def test_where_norms_are_fused(step: dict, device: torch.device, is_fused: bool) -> None:
    task = make_task()
    said = fuse_layer_norms(task, make_config(step=step), device)
    assert (said is not None) == is_fused
    assert any(isinstance(module, FusedLayerNorm) for module in task.model.modules()) == is_fused


def test_norms_of_a_model_that_the_loss_differentiates_are_fused_on_demand() -> None:
    """Their second derivatives are right, and not measured."""
    task = dataclasses.replace(make_task(), double_backward=True)
    assert fuse_layer_norms(task, make_config(), CUDA) is None
    assert fuse_layer_norms(task, make_config(step={"layer_norm": "fused"}), CUDA) is not None


class OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


def no_loss(model: nn.Module, batch: Batch) -> Loss:
    raise NotImplementedError


def test_norms_that_compute_something_else_are_kept_and_named() -> None:
    task = Task(model=nn.Sequential(nn.LayerNorm(4), OwnNorm(4)), loss=no_loss)
    said = fuse_layer_norms(task, make_config(), CUDA)
    first, second = (said or "").splitlines()
    assert first == "fused layer norm: 1 swapped, 1 kept"
    assert second == "  1: kept, OwnNorm has a forward of its own"
    assert type(task.model[1]) is OwnNorm  # pyright: ignore[reportIndexIssue]


def test_fused_norms_in_a_model_without_any_are_not_passed_over_silently() -> None:
    task = Task(model=nn.Linear(2, 2), loss=no_loss)
    assert fuse_layer_norms(task, make_config(), CUDA) is None
    said = fuse_layer_norms(task, make_config(step={"layer_norm": "fused"}), CPU)
    assert said == "fused layer norm: 0 swapped, 0 kept"
