"""Swin blocks and perceivers on fastft's kernels: upstream's formulas."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aurora.model.perceiver import PerceiverResampler
from aurora.model.swin3d import Swin3DTransformerBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.adapters.aurora import fused as fused_module
from fastft.adapters.aurora.fused import Residual, use_kernels
from fastft.blocks import BlockForwards
from fastft.precision import make_precision
from fastft.task import Batch, Task

CPU = torch.device("cpu")
# Heads of 16 columns, the fewest that the kernel takes.
WIDE = {"embed_dim": 32}
LORA = {"use_lora": True, "lora_mode": "from_second"}
GRID = (2, 9, 17)  # Padded along both axes, unevenly along the first.


def make_block(shift: tuple[int, int, int], device: torch.device = CPU, **arguments: Any) -> Any:
    torch.manual_seed(0)
    block = Swin3DTransformerBlock(
        **{"dim": 64, "num_heads": 2, "time_dim": 32, "window_size": (2, 6, 12)} | arguments,
        shift_size=shift,
    ).to(device)
    with torch.no_grad():
        # At its initialisation a block is the identity.
        for name, parameter in block.named_parameters():
            if "ln_modulation" in name:
                parameter.normal_(std=0.1)
    return block


def fused(block: Any, residual: Residual = "fp32") -> Any:
    use_kernels(block, residual)
    return block


def outcome(block: Any, autocast: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    device = next(block.parameters()).device
    draw = torch.Generator().manual_seed(1)
    tokens = GRID[0] * GRID[1] * GRID[2]
    x = torch.randn(2, tokens, 64, generator=draw).to(device, dtype).requires_grad_()
    c = torch.randn(2, 32, generator=draw).to(device, dtype).requires_grad_()
    dy = torch.randn(2, tokens, 64, generator=draw).to(device, dtype)
    block.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = block(x, c, GRID, 0)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad, "c": c.grad}
    return found | {name: p.grad.clone() for name, p in block.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((a[n].double() - v.double()).norm() / v.double().norm()) for n, v in b.items()}


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 3, 6)])
def test_formulas_are_upstreams(shift: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "_LOW", (torch.float32,))
    theirs = outcome(make_block(shift), autocast=False)
    ours = outcome(fused(make_block(shift)), autocast=False)
    assert set(ours) == set(theirs)
    assert max(distance(ours, theirs).values()) < 1e-5


@pytest.mark.parametrize("residual", ["fp32", "autocast"])
def test_one_graph_in_16_bits(residual: Any) -> None:
    block = fused(make_block((1, 3, 6)), residual)
    plain = outcome(block, autocast=True)
    assert plain["y"].dtype is torch.float32  # As the input, which both add to.
    block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    assert max(distance(outcome(block, autocast=True), plain).values()) < 1e-5


def test_low_precision_stays_where_it_is_wanted() -> None:
    x, c = torch.randn(1, 306, 64, dtype=torch.bfloat16), torch.randn(1, 32)
    for residual, dtype in (("fp32", torch.float32), ("autocast", torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            y = fused(make_block((0, 0, 0)), residual)(x, c, GRID, 0)  # type: ignore[arg-type]
        assert y.dtype is dtype


def watch(part: str) -> Callable[[Any], Any]:
    """A change by a forward hook, as an added norm is one."""

    def change(block: Any) -> None:
        block.get_submodule(part).register_forward_hook(lambda module, inputs, output: 2 * output)

    return change


def replace(block: Any) -> None:
    block.norm1.ln = nn.LayerNorm(64)


LEFT: dict[str, tuple[dict[str, Any], Any, str]] = {
    "attention's dropout": ({"attn_drop": 0.1}, None, "dropout of attention"),
    "paths' dropout": ({"drop_path": 0.1}, None, "dropout of attention or of paths"),
    "window": ({"window_size": (4, 6, 12)}, None, "windows have 288 tokens, more than 256"),
    "heads": ({"num_heads": 8}, None, "heads have 8 columns"),
    "attention": ({}, watch("attn"), "parts were changed"),
    "norm": ({}, watch("norm2"), "parts were changed"),
    "norm's norm": ({}, watch("norm1.ln"), "parts were changed"),
    "another norm": ({}, replace, "parts were changed"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_the_kernels_do_not_do_is_left_to_upstream_and_said(case: str) -> None:
    arguments, change, reason = LEFT[case]
    block = make_block((0, 0, 0), **arguments)
    if change:
        change(block)
    (note,) = use_kernels(block, "fp32")
    assert note.startswith("1 Swin blocks run on upstream's operators, because")
    assert reason in note
    assert "forward" not in vars(block)


def test_changes_of_what_is_called_are_taken() -> None:
    """As those of finetune.method = 'lora', which replaces linear maps."""
    block = make_block((0, 0, 0))
    for part in ("attn.qkv", "attn.proj", "mlp", "norm1.ln_modulation"):
        watch(part)(block)
    assert use_kernels(block, "fp32") == []
    assert max(distance(*(_doubled(each) for each in (True, False))).values()) < 2e-2


def _doubled(on_kernels: bool) -> dict[str, Tensor]:
    block = make_block((1, 3, 6))
    for part in ("attn.qkv", "attn.proj", "mlp", "norm1.ln_modulation"):
        watch(part)(block)
    if on_kernels:
        use_kernels(block, "fp32")
    return outcome(block, autocast=True)


def test_added_norms_are_run(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm behind attention, on a GPU: its block is upstream's, the others are on kernels."""
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    adapter = make_adapter(layer_norms=["backbone.encoder_layers.0.blocks.0.attn"], arguments=WIDE)
    gpu = torch.device("cuda")
    task = adapter.build(None, device=gpu, checkpoint=None, pretrained=False)
    assert [note.partition(" ")[0] for note in task.notes] == ["1"]
    on_kernels = [
        name
        for name, module in task.model.named_modules()
        if isinstance(module, Swin3DTransformerBlock) and "forward" in vars(module)
    ]
    assert len(on_kernels) == 5
    assert "backbone.encoder_layers.0.blocks.0" not in on_kernels


def test_full_precision_keeps_upstreams_bits() -> None:
    theirs = outcome(make_block((1, 3, 6)), autocast=False)
    ours = outcome(fused(make_block((1, 3, 6))), autocast=False)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def losses(task: Task, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    task.model.zero_grad()
    with make_precision("bf16", device).autocast():
        loss = task.loss(task.model, batch)
    loss.total.backward()
    grads = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
    return {"loss": loss.total.detach(), **grads}


@pytest.mark.parametrize("more", [{}, LORA], ids=["plain", "lora"])
def test_a_whole_model(more: Any, make_adapter: Any, build: Any, make_samples: Any) -> None:
    name = "Aurora" if more else "AuroraPretrained"
    adapter = make_adapter(rollout_steps=2, model_class=name, arguments={**WIDE, **more})
    task = build(adapter)
    batch = Batch(adapter.collate(make_samples(adapter)), 2)
    theirs = losses(task, batch, CPU)
    use_kernels(task.model, "fp32")
    ours = losses(task, batch, CPU)
    assert set(ours) == set(theirs)
    assert not torch.equal(ours["loss"], theirs["loss"])  # The kernels' path was taken.
    assert distance(ours, theirs)["loss"] < 1e-3


@pytest.mark.parametrize(
    ("way", "again"), [("recompute pointwise", False), ("recompute pointwise, attention", True)]
)
def test_attention_is_kept_as_attention(
    way: str, again: bool, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    adapter = make_adapter(arguments=WIDE)
    task, batch = build(adapter), Batch(adapter.collate(make_samples(adapter)), 2)
    use_kernels(task.model, "fp32")
    precision = make_precision("bf16", CPU)
    forwards = BlockForwards(task, "off", precision)
    expected = losses(task, batch, CPU)
    forwards.use(dict.fromkeys(forwards.blocks, way))
    with precision.autocast():
        loss = task.loss(task.model, batch).total
    seen: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    task.model.zero_grad()
    with Names():
        loss.backward()
    for op in ("window_attention_forward", "short_attention_forward"):
        assert (f"fastft::{op}" in seen) == again
    assert "fastft::adaptive_norm_forward" not in seen
    found = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_copy_computes_with_its_own_weights() -> None:
    block = fused(make_block((1, 3, 6)))
    copied, expected = copy.deepcopy(block), outcome(block, autocast=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    found = outcome(copied, autocast=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("residual", ["fp32", "autocast"])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 3, 6)])
def test_as_near_to_the_truth_as_upstream(shift: Any, residual: Any) -> None:
    gpu = torch.device("cuda")
    truth = outcome(make_block(shift).double(), autocast=False, dtype=torch.float64)
    theirs = distance(outcome(make_block(shift, gpu), autocast=True), _on(gpu, truth))
    ours = distance(
        outcome(fused(make_block(shift, gpu), residual), autocast=True), _on(gpu, truth)
    )
    for name, error in ours.items():
        assert error < 2 * theirs[name] + 1e-3, name


def _on(device: torch.device, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in values.items()}


def perceive(resampler: Any, batch: int, autocast: bool) -> dict[str, Tensor]:
    """Of latents that are the same for all patches."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 32, generator=draw).requires_grad_()
    x = torch.randn(batch, 5, 32, generator=draw).requires_grad_()
    dy = torch.randn(batch, 3, 32, generator=draw)
    resampler.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = resampler(latents.expand(batch, -1, -1), x)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "latents": latents.grad, "x": x.grad}
    found |= {name: p.grad.clone() for name, p in resampler.named_parameters()}
    # Keys that are all shifted alike change nothing: its gradient is rounding.
    found.pop("layers.0.0.ln_k.bias", None)
    return found


@pytest.mark.parametrize("settings", [{}, {"ln_k_q": True}, {"depth": 2}], ids=str)
def test_perceivers(settings: Any) -> None:
    def make() -> PerceiverResampler:
        torch.manual_seed(0)
        sizes = {"latent_dim": 32, "context_dim": 32, "head_dim": 16, "num_heads": 2}
        return PerceiverResampler(**sizes, **settings)

    whole, low = (perceive(make(), 7, autocast) for autocast in (False, True))
    resampler = make()
    use_kernels(resampler, "fp32")
    assert max(distance(perceive(resampler, 7, autocast=False), whole).values()) < 1e-5
    ours, theirs = distance(perceive(resampler, 7, autocast=True), whole), distance(low, whole)
    assert all(error < 2 * theirs[name] + 1e-3 for name, error in ours.items())
    resampler.forward = torch.compile(resampler.forward, fullgraph=True, backend="aot_eager")
    assert max(distance(perceive(resampler, 7, autocast=False), whole).values()) < 1e-5
