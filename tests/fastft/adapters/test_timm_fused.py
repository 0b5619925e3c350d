"""Swin blocks of timm on fastft's kernel: timm's formulas, masks and names."""

import contextlib
import copy
import io
from typing import Any, cast

import pytest
import torch
from fastft_kernels.device import pretend_gpu
from fastft_kernels.window_grid import Grid, tables
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.adapters.timm import TimmAdapter, TimmOptions
from fastft.adapters.timm_fused import use_kernels
from fastft.blocks import BlockForwards
from fastft.precision import make_precision
from fastft.task import Batch, Loss, Task, repeated_blocks

CPU = torch.device("cpu")
FORWARD, BACKWARD = (f"fastft::window_attention_{way}" for way in ("forward", "backward"))
BLOCK = {"dim": 32, "input_resolution": (14, 14), "num_heads": 2}
SMALL = {"img_size": 56, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 3}


def make_block(device: torch.device = CPU, **arguments: Any) -> SwinTransformerBlock:
    torch.manual_seed(0)
    block = SwinTransformerBlock(**{**BLOCK, "shift_size": 3, **arguments}).to(device)
    with torch.no_grad():
        # At its initialisation the bias hardly matters.
        block.attn.relative_position_bias_table.normal_()
    return block


def make_model(**arguments: Any) -> SwinTransformer:
    torch.manual_seed(0)
    return SwinTransformer(**{**SMALL, "drop_path_rate": 0.0, **arguments})


def fused(module: Any) -> Any:
    assert use_kernels(module) == []
    return module


def outcome(module: Any, shape: tuple[int, ...], autocast: bool = False) -> dict[str, Tensor]:
    """Output and gradients."""
    parameter = next(module.parameters())
    device, dtype = parameter.device, parameter.dtype
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()
    module.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = module(x)
    dy = torch.randn(y.shape, generator=draw).to(device)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad.clone() for name, p in module.named_parameters()}


class Operators(TorchDispatchMode):
    """Names of those that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert set(a) == set(b)
    return {n: float((a[n].double() - v.double()).norm() / v.double().norm()) for n, v in b.items()}


@pytest.mark.parametrize("shape", [(14, 14), (14, 7), (21, 28)], ids=str)
def test_tokens_are_told_apart_as_in_timms_mask(shape: tuple[int, int]) -> None:
    block = make_block(input_resolution=shape)
    _, mask = tables(Grid((1, *shape), (1, 7, 7), (0, *block.shift_size), False), 1, torch.ones(()))
    assert mask is not None
    assert torch.equal(mask[:, 0], cast(Tensor, block.attn_mask))


CASES: dict[str, dict[str, Any]] = {
    "not shifted": {"shift_size": 0},
    "shifted": {},
    "shifted along one axis": {"input_resolution": (14, 7)},
    "one window": {"input_resolution": (7, 7)},
    "heads of their own width": {"head_dim": 32},
    "no bias of queries": {"qkv_bias": False},
    "uneven windows": {"window_size": (2, 7), "shift_size": (1, 3)},
    "any size": {"dynamic_mask": True},
}


@pytest.mark.parametrize("case", CASES)
def test_formulas_are_timms(case: str) -> None:
    shape = (2, *CASES[case].get("input_resolution", (14, 14)), 32)
    theirs = outcome(make_block(**CASES[case]), shape)
    with Operators() as seen:
        ours = outcome(fused(make_block(**CASES[case])), shape)
    assert {FORWARD, BACKWARD} <= seen.names
    assert max(distance(ours, theirs).values()) < 1e-5


@pytest.mark.usefixtures("kernel_path")
def test_the_kernel_itself() -> None:
    theirs, ours = (
        outcome(block, (1, 14, 14, 32)) for block in (make_block(), fused(make_block()))
    )
    assert max(distance(ours, theirs).values()) < 1e-5


def test_a_whole_model() -> None:
    theirs, ours = make_model(), fused(make_model())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all("_attn" in vars(block) for stage in ours.layers for block in stage.blocks)
    shape = (2, 3, 56, 56)
    assert max(distance(outcome(ours, shape), outcome(theirs, shape)).values()) < 1e-5
    truth = outcome(theirs, shape)
    near = distance(outcome(theirs, shape, autocast=True), truth)
    for name, error in distance(outcome(ours, shape, autocast=True), truth).items():
        assert error < 2 * near[name] + 1e-3, name


def test_one_graph_for_blocks_of_a_kind() -> None:
    model = fused(make_model(depths=(2, 4)))
    blocks = [block for stage in model.layers for block in stage.blocks]
    expected = outcome(model, (2, 3, 56, 56))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = torch.compile(SwinTransformerBlock.forward, fullgraph=True, backend="aot_eager")
    for block in blocks:
        block.forward = forward.__get__(block)
    assert max(distance(outcome(model, (2, 3, 56, 56)), expected).values()) < 1e-5
    # The second stage has one window of tokens, and no shift.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize(
    ("way", "again"), [("recompute pointwise", False), ("recompute pointwise, attention", True)]
)
def test_attention_is_kept_as_attention(way: str, again: bool) -> None:
    def loss(model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(batch["inputs"]).square().sum())

    model = fused(make_model())
    task = Task(model=model, loss=loss, blocks=repeated_blocks(model))
    forwards = BlockForwards(task, "off", make_precision("fp32", CPU))
    assert {type(block.module) for block in task.blocks} == {SwinTransformerBlock}
    forwards.use(dict.fromkeys(forwards.blocks, way))
    total = model(torch.ones(1, 3, 56, 56)).square().sum()
    with Operators() as seen:
        total.backward()
    assert BACKWARD in seen.names
    assert (FORWARD in seen.names) == again


def test_a_copy_computes_with_its_own_weights() -> None:
    block = fused(make_block())
    copied, expected = copy.deepcopy(block), outcome(block, (1, 14, 14, 32))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    found = outcome(copied, (1, 14, 14, 32))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_pickle_is_loaded_with_timms() -> None:
    block, file = fused(make_block()), io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with Operators() as seen:
        found = outcome(loaded, (1, 14, 14, 32))
    assert FORWARD not in seen.names
    assert max(distance(found, outcome(block, (1, 14, 14, 32))).values()) < 1e-5


def test_windows_that_grow_later_are_timms() -> None:
    theirs, ours = make_block(), fused(make_block())
    for block in (theirs, ours):
        block.set_input_size((24, 24), (12, 12))
    found, expected = (outcome(block, (1, 24, 24, 32)) for block in (ours, theirs))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_low_rank_updates_of_what_it_calls_are_taken() -> None:
    peft = pytest.importorskip("peft")
    blocks = make_block(), fused(make_block())
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False)
    for block in blocks:
        torch.manual_seed(2)
        peft.inject_adapter_in_model(config, block)
        block.requires_grad_(True)
    with Operators() as seen:
        ours = outcome(blocks[1], (1, 14, 14, 32))
    assert FORWARD in seen.names
    assert max(distance(ours, outcome(blocks[0], (1, 14, 14, 32))).values()) < 1e-5


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def watch(block: SwinTransformerBlock) -> None:
    block.attn.register_forward_hook(doubled)


def subclass(block: SwinTransformerBlock) -> None:
    block.attn.__class__ = type("Mine", (type(block.attn),), {})


LEFT: dict[str, tuple[dict[str, Any], Any, str]] = {
    "attention's dropout": ({"attn_drop": 0.1}, None, "dropout of attention"),
    "window": (
        {"window_size": 12, "input_resolution": (24, 24)},
        None,
        "have 144 tokens, more than",
    ),
    "heads": ({"num_heads": 4}, None, "heads have 8 columns"),
    "padding": ({"input_resolution": (14, 16)}, None, "windows do not divide their grid"),
    "a shift in one window": (
        {"input_resolution": (7, 7), "always_partition": True},
        None,
        "windows do not divide their grid",
    ),
    "a hook": ({}, watch, "attention were changed"),
    "a subclass": ({}, subclass, "attention were changed"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_the_kernel_does_not_do_is_left_to_timm_and_said(case: str) -> None:
    arguments, change, reason = LEFT[case]
    block = make_block(**arguments)
    if change:
        change(block)
    (note,) = use_kernels(block)
    assert note.startswith("1 Swin blocks run on timm's operators, because")
    assert reason in note
    assert "_attn" not in vars(block)


@pytest.mark.parametrize("case", ["padded", "in float64", "wide"])
def test_what_comes_otherwise_in_a_call_is_timms(case: str) -> None:
    arguments = {"padded": {"dynamic_mask": True}, "wide": {"head_dim": 128}}.get(case, {})
    dtype = torch.float64 if case == "in float64" else torch.float32
    shape = (1, 14, 9 if case == "padded" else 14, 32)
    theirs, ours = (make_block(**arguments).to(dtype) for _ in range(2))
    with Operators() as seen:
        found = outcome(fused(ours), shape)
    assert FORWARD not in seen.names
    assert all(torch.equal(found[n], value) for n, value in outcome(theirs, shape).items())


def test_changes_of_what_is_called_are_taken() -> None:
    blocks = make_block(), make_block()
    for block in blocks:
        for part in (block.attn.qkv, block.attn.proj, block.norm1):
            part.register_forward_hook(doubled)
    fused(blocks[1])
    theirs, ours = (outcome(block, (1, 14, 14, 32)) for block in blocks)
    assert max(distance(ours, theirs).values()) < 1e-5


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "as if on a GPU"])
def test_the_option(kernels: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretending = contextlib.nullcontext() if kind in ("cpu", "cuda") else pretend_gpu()
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    sizes = {
        name: value for name, value in SMALL.items() if name not in ("img_size", "num_classes")
    }
    options = TimmOptions(
        name="swin_tiny_patch4_window7_224",
        num_classes=3,
        img_size=112,
        arguments=sizes,
        kernels=kernels,
    )
    with pretending:
        task = TimmAdapter(options).build(
            lambda predictions, fields: Loss(predictions.mean()),
            device=torch.device("cuda" if kind == "cuda" else "cpu"),
            checkpoint=None,
            pretrained=False,
        )
    on_kernel = ["_attn" in vars(block.module) for block in task.blocks]
    assert on_kernel == [kernels == "auto" and kind != "cpu"] * 4
    assert task.notes == []


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 3])
def test_as_near_to_the_truth_as_timm(shift: int) -> None:
    gpu, shape = torch.device("cuda"), (3, 14, 14, 32)
    truth = outcome(make_block(shift_size=shift).double(), shape)
    truth = {name: value.to(gpu) for name, value in truth.items()}
    for autocast in (False, True):
        theirs = distance(outcome(make_block(gpu, shift_size=shift), shape, autocast), truth)
        ours = distance(outcome(fused(make_block(gpu, shift_size=shift)), shape, autocast), truth)
        for name, error in ours.items():
            assert error < 2 * theirs[name] + 1e-3, name
