"""What only a GPU can show: precisions, compiled blocks, and a step that never waits."""

import contextlib
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from fastft.assemble import assemble, build_step
from fastft.blocks import (
    KEEP,
    LEAST,
    OFFLOAD,
    RECOMPUTE,
    BlockForwards,
    Way,
    compile_task,
    ways,
)
from fastft.config import RunConfig
from fastft.data import open_loader
from fastft.finetune import set_train_mode
from fastft.memory import budget, make_plan, try_rehearsal
from fastft.precision import make_precision
from fastft.runfile import parse
from fastft.step import Ema, TrainingStep
from fastft.task import Batch, Block, Loss, Task
from fastft.train import train

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
MODEL = {"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """Noisy images whose class is the texture that repeats in them."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(4, 1, 4, 4))
    for split in ("train", "validation"):
        targets = rng.integers(0, 4, 256)
        images = np.tile(patterns[targets], (1, 1, 4, 4)) + rng.normal(size=(256, 1, 16, 16))
        np.savez(tmp_path / f"{split}.npz", inputs=images.astype(np.float32), targets=targets)
    return tmp_path


def make_config(images: Path, folder: Path, **sections) -> RunConfig:
    tree = {
        "run": {"folder": str(folder), "steps": 60, "device": "cuda"},
        "model": {
            "adapter": "timm",
            "options": {
                "name": "vit_tiny_patch16_224",
                "num_classes": 4,
                "in_chans": 1,
                "img_size": 16,
                "arguments": MODEL,
            },
        },
        "data": {
            "train": [{"path": str(images / "train.npz")}],
            "validation": [{"path": str(images / "validation.npz")}],
            "batch_size": 32,
            "workers": 2,
        },
        "loss": {"terms": [{"name": "cross_entropy"}]},
        "optim": {"lr": 3e-3, "weight_decay": 0.01},
        "gradients": {"clip_norm": 1.0},
        "evaluate": {"metrics": [{"name": "accuracy"}]},
        "log": {"every_steps": 30, "tensorboard": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse(RunConfig, tree, where="test")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("compile_mode", ["off", "blocks"])
def test_every_precision_learns(
    textures: Path, tmp_path: Path, precision: str, compile_mode: str
) -> None:
    step = {"precision": precision, "compile": compile_mode}
    config = make_config(textures, tmp_path / "run", step=step)
    result = train(config, Console(file=io.StringIO()))
    assert result is not None
    assert result.metrics["accuracy"] > 0.9


def losses(config: RunConfig, steps: int) -> list[float]:
    torch.manual_seed(0)
    step, batches, _, _ = build(config)
    return [step(i, [next(batches).to(CUDA)]).loss.item() for i in range(steps)]


def build(config: RunConfig):
    console = Console(file=io.StringIO())
    task, adapter = assemble(config, CUDA, console)
    loader = open_loader(adapter, config.data, seed=0, device=CUDA)
    step, forwards = build_step(config, task, CUDA, console)
    set_train_mode(task.model, "full")
    return step, iter(loader.batches()), Ema(step.optimizer.parameters, 0.99), forwards


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(textures: Path, tmp_path: Path, precision: str) -> None:
    config = make_config(textures, tmp_path, step={"precision": "fp32"}, data={"workers": 0})
    low = make_config(textures, tmp_path, step={"precision": precision}, data={"workers": 0})
    for a, b in zip(losses(config, 10), losses(low, 10), strict=True):
        assert math.isclose(a, b, rel_tol=0.05)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [({"kernels": "auto"}, {"kernels": "off"}), ({"layer_norm": "fused"}, {"layer_norm": "torch"})],
    ids=str,
)
def test_kernels_follow_torch(textures: Path, tmp_path: Path, ours: dict, torchs: dict) -> None:
    runs = [
        losses(
            make_config(
                textures, tmp_path, step={"precision": "bf16", **step}, data={"workers": 0}
            ),
            10,
        )
        for step in (ours, torchs)
    ]
    for a, b in zip(*runs, strict=True):
        assert math.isclose(a, b, rel_tol=0.01)


@contextlib.contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Calls by which the host waits for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


ZCLIP = {"zclip": {"warmup_steps": 2}}
# Every optimizer in every mode; then what is no default, once each.
STEPS = [
    {"optim": {"name": name}, "step": {"precision": precision, "compile": mode}}
    for name in ("adamw", "adam", "sgd", "rmsprop")
    for precision in ("bf16", "fp16")
    for mode in ("off", "blocks")
] + [
    {"step": {"kernels": "off", "layer_norm": "torch"}},
    {"optim": {"moments": "bf16"}, "gradients": ZCLIP},
    {"optim": {"moments": "8bit"}, "gradients": ZCLIP, "step": {"precision": "fp16"}},
    {"optim": {"moments": "8bit"}, "step": {"compile": "blocks", "layer_norm": "fused"}},
]


@pytest.mark.parametrize("sections", STEPS, ids=str)
def test_no_step_waits_for_the_device(textures: Path, tmp_path: Path, sections: dict) -> None:
    step, batches, ema, _ = build(make_config(textures, tmp_path, **sections))
    assert_no_waits(step, batches, ema)


@pytest.mark.parametrize("mode", ["off", "blocks"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_waits_with_a_plan(
    textures: Path, tmp_path: Path, precision: str, mode: str
) -> None:
    config = make_config(textures, tmp_path, step={"precision": precision, "compile": mode})
    step, batches, ema, forwards = build(config)
    # Every block another way, of those that compute most again.
    names = [way.name for way in ways(mode)[-len(forwards.blocks) :]]
    forwards.use(dict(zip(forwards.blocks, names, strict=True)))
    assert_no_waits(step, batches, ema)


def assert_no_waits(
    step: TrainingStep, batches: Iterator[Batch], ema: Ema, *, to_host: bool = False
) -> None:
    """That no step waits, nor copies anything to the host, unless it should."""
    for i in range(3):
        step(i, [next(batches).to(CUDA)])
    torch.cuda.synchronize()
    steps_only = torch.profiler.record_function("steps")
    with torch.profiler.profile() as profile, waiting_forbidden(), steps_only:
        for i in range(3, 8):
            step(i, [next(batches).to(CUDA)])
            ema.update(i)
    events = profile.events()
    assert events is not None
    steps = next(event for event in events if event.name == "steps").time_range
    inside = [e.name for e in events if steps.start <= e.time_range.start <= steps.end]
    assert any("cudaLaunchKernel" in name for name in inside)
    assert [name for name in inside if name in WAITS] == []
    assert any("DtoH" in name for name in inside) is to_host


VIT = {"name": "vit_small_patch16_224", "num_classes": 10}


@pytest.fixture
def whole_device() -> Iterator[None]:
    """Takes the limit off that a test set."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    torch.cuda.empty_cache()


def build_vit(mode: str, folder: Path) -> tuple[TrainingStep, BlockForwards, list[Batch]]:
    config = make_config(
        folder,
        folder,
        model={"options": VIT},
        step={"precision": "bf16", "compile": mode},
        optim={"lr": 1e-4},
    )
    torch.manual_seed(0)
    console = Console(file=io.StringIO())
    task, _ = assemble(config, CUDA, console)
    step, forwards = build_step(config, task, CUDA, console)
    set_train_mode(task.model, "full")
    images = torch.randn(4, 128, 3, 224, 224, device=CUDA)
    targets = torch.randint(10, (4, 128), device=CUDA)
    batches = [
        Batch({"inputs": x, "targets": y}, 128) for x, y in zip(images, targets, strict=True)
    ]
    return step, forwards, batches


@pytest.mark.usefixtures("whole_device")
@pytest.mark.parametrize("mode", ["off", "blocks"])
def test_a_plan_keeps_to_its_budget_and_changes_no_loss(mode: str, tmp_path: Path) -> None:
    step, forwards, batches = build_vit(mode, tmp_path)
    start = {name: value.clone() for name, value in step.task.model.state_dict().items()}

    def train_anew() -> list[float]:
        step.task.model.load_state_dict(start)
        step.optimizer.forget()
        return [step(i, [batches[i % 4]]).loss.item() for i in range(20)]

    peaks = {}
    for way in (KEEP, RECOMPUTE):
        forwards.use_everywhere(way)
        found = try_rehearsal(step, batches[:1], 2**62)
        assert found is not None
        peaks[way] = found.peak_bytes
    assert peaks[RECOMPUTE] < 0.7 * peaks[KEEP]
    forwards.use_everywhere(KEEP)
    expected = train_anew()
    assert expected[-1] < expected[0]
    for share in (0.2, 0.5, 0.8):
        limit = round(peaks[RECOMPUTE] + share * (peaks[KEEP] - peaks[RECOMPUTE]))
        torch.cuda.empty_cache()
        budget.enforce(limit, CUDA)
        found = make_plan(step, forwards, batches[:1], limit, Console(file=io.StringIO()))
        assert dict(forwards.chosen) == found.ways
        assert set(found.ways.values()) != {KEEP.name}
        losses_within = train_anew()
        torch.cuda.reset_peak_memory_stats(CUDA)
        step(20, batches[:1])
        peak = torch.cuda.max_memory_allocated(CUDA)
        assert peak <= limit
        assert found.predicted_bytes == pytest.approx(peak, rel=0.03)
        # Attention's backward on a GPU adds in no fixed order.
        assert losses_within == pytest.approx(expected, rel=0.02)
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


@pytest.mark.parametrize("mode", ["off", "blocks"])
def test_every_way_draws_the_random_numbers_of_its_first_forward(mode: str) -> None:
    """Dropout in attention, which the fused kernels draw themselves, and behind it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.2, batch_first=True, norm_first=True)
    model = nn.Sequential(layer).to(CUDA)
    task = Task(model, lambda model, batch: Loss(torch.zeros(())), (Block("0", layer),))
    precision = make_precision("bf16", CUDA)
    forwards = compile_task(task, mode, precision)
    inputs = torch.randn(8, 32, 64, device=CUDA, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        with precision.autocast():
            output = model(inputs)
        loss = (output.float() * torch.linspace(0, 1, 64, device=CUDA)).sum()
        return list(torch.autograd.grad(loss, [inputs, *model.parameters()]))

    forwards.use_everywhere(KEEP)
    expected = gradients()
    for way in ways(mode):
        forwards.use_everywhere(way)
        for got, want in zip(gradients(), expected, strict=True):
            assert (got - want).norm() <= 0.02 * want.norm() + 1e-6, way.name


class Wide(nn.Module):
    """Nothing in it adds in an order that may change; `x`: [N, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(512), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(512, 2048), nn.Linear(2048, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        return x + self.dropout(self.down(hidden))


offloading = pytest.mark.parametrize("way", [OFFLOAD, LEAST], ids=lambda way: way.name)


@offloading
@pytest.mark.parametrize("mode", ["off", "blocks"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_comes_back_from_the_host_has_the_same_bits(
    precision: str, mode: str, way: Way
) -> None:
    """Many steps, that use memory anew at once: a copy that is not waited for would show."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Wide() for _ in range(6))).to(CUDA)
    blocks = tuple(Block(name, module) for name, module in model.named_children())
    task = Task(model, lambda model, batch: Loss(torch.zeros(())), blocks)
    casts = make_precision(precision, CUDA)
    forwards = compile_task(task, mode, casts)
    inputs = torch.randn(3, 8192, 512, device=CUDA)

    def gradients(x: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(3)
        with casts.autocast():
            output = model(x * torch.ones((), device=CUDA, requires_grad=True))
        return list(torch.autograd.grad(output.float().square().mean(), list(model.parameters())))

    forwards.use_everywhere(KEEP)
    expected = [gradients(x) for x in inputs]
    forwards.use_everywhere(way)
    differ = [
        torch.stack([(a != b).any() for a, b in zip(gradients(x), want, strict=True)]).any()
        for _ in range(10)
        for x, want in zip(inputs, expected, strict=True)
    ]
    assert not torch.stack(differ).any()
    assert forwards.host.pinned_bytes >= 6 * inputs[0].nbytes // 2
    assert forwards.host.held_bytes == 0


@offloading
@pytest.mark.parametrize("mode", ["off", "blocks"])
def test_no_step_waits_for_the_host(mode: str, way: Way, tmp_path: Path) -> None:
    step, forwards, batches = build_vit(mode, tmp_path)
    forwards.use_everywhere(way)
    ema = Ema(step.optimizer.parameters, 0.99)
    assert_no_waits(step, itertools.cycle(batches), ema, to_host=True)


@pytest.mark.usefixtures("whole_device")
@pytest.mark.parametrize("mode", ["off", "blocks"])
def test_inputs_on_the_host_fit_where_recomputing_alone_does_not(mode: str, tmp_path: Path) -> None:
    step, forwards, batches = build_vit(mode, tmp_path)
    peaks = {}
    for way in (RECOMPUTE, LEAST):
        forwards.use_everywhere(way)
        found = try_rehearsal(step, batches[:1], 2**62)
        assert found is not None
        peaks[way] = found.peak_bytes
    # Of twelve blocks, in fp32; two of them are on the device at a time, and the peak moves.
    inputs = 12 * 128 * 197 * 384 * 4
    assert 0.5 * inputs < peaks[RECOMPUTE] - peaks[LEAST] < 1.05 * inputs
    limit = round((peaks[RECOMPUTE] + peaks[LEAST]) / 2)
    torch.cuda.empty_cache()
    budget.enforce(limit, CUDA)
    found = make_plan(step, forwards, batches[:1], limit, Console(file=io.StringIO()))
    assert {LEAST.name, OFFLOAD.name} & set(found.ways.values())
    assert found.host_bytes > 0
    torch.cuda.reset_peak_memory_stats(CUDA)
    step(0, batches[:1])
    peak = torch.cuda.max_memory_allocated(CUDA)
    assert peak <= limit
    assert found.predicted_bytes == pytest.approx(peak, rel=0.03)
