"""Ways to run a block where a model does more than call it once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from fastft import blocks
from fastft.blocks import COMPILED, EAGER, KEEP, RECOMPUTE, BlockForwards, Way
from fastft.compiling import draws_numbers
from fastft.errors import PlanError
from fastft.precision import make_precision
from fastft.task import Block, Loss, Task

CPU = torch.device("cpu")
every_way = pytest.mark.parametrize("way", EAGER, ids=lambda way: way.name)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, debug: int = 0) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * (1 + debug)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            # `checkpoint` has an argument of this name.
            x = layer(x, debug=1)
        return x


def make() -> tuple[Stack, BlockForwards]:
    torch.manual_seed(0)
    model = Stack().double()
    layers = tuple(Block(f"layers.{i}", layer) for i, layer in enumerate(model.layers))
    task = Task(model, lambda model, batch: Loss(torch.zeros(())), layers)
    return model, BlockForwards(task, "off", make_precision("fp32", CPU))


@every_way
def test_keywords_reach_the_block(way: Way) -> None:
    model, forwards = make()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = model(x)
    forwards.use_everywhere(way)
    assert torch.equal(model(x), expected)


def test_recomputation_sees_all_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws the same random numbers again on the devices of the tensors that it is shown."""
    seen: list[Any] = []
    infer = checkpoint._infer_device_type

    def noted(*arguments: Any) -> str:
        seen.extend(tree_leaves(arguments))
        return infer(*arguments)

    monkeypatch.setattr(checkpoint, "_infer_device_type", noted)
    model, forwards = make()
    forwards.use_everywhere(RECOMPUTE)
    x, debug = torch.randn(4, 8, dtype=torch.float64), torch.ones(())
    model.layers[0](x, debug=debug)
    assert any(leaf is x for leaf in seen)
    assert any(leaf is debug for leaf in seen)


@every_way
def test_a_deep_copy_has_its_own_weights(way: Way) -> None:
    model, forwards = make()
    forwards.use_everywhere(way)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(other(x), x)


@every_way
def test_a_loss_on_gradients_is_right_or_refused(way: Way) -> None:
    def weight_gradients(model: Stack) -> list[Tensor]:
        x = torch.linspace(-1, 1, 32, dtype=torch.float64).view(4, 8).requires_grad_()
        (force,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        weights = [layer.up.weight for layer in model.modules() if isinstance(layer, Layer)]
        return list(torch.autograd.grad(force.square().sum(), weights))

    model, forwards = make()
    expected = weight_gradients(model)
    forwards.use_everywhere(way)
    if way.operators is not None:
        with pytest.raises(PlanError, match="cannot be differentiated twice"):
            weight_gradients(model)
        return
    for got, want in zip(weight_gradients(model), expected, strict=True):
        torch.testing.assert_close(got, want)


@every_way
def test_autocast_that_a_model_switches_off_stays_off(way: Way) -> None:
    model, forwards = make()
    model.float()
    forwards.use_everywhere(way)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert model(torch.randn(4, 8)).dtype == torch.float32


def test_the_cache_of_casts_is_off_inside() -> None:
    seen: list[bool] = []
    model, forwards = make()
    model.get_submodule("layers.0.up").register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_cache_enabled())
    )
    forwards.use_everywhere(RECOMPUTE)
    model(torch.randn(4, 8, dtype=torch.float64)).sum().backward()
    # Forward and recomputation; otherwise every cast weight would stay until autocast ends.
    assert seen == [False, False]
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("way", COMPILED, ids=lambda way: way.name)
def test_the_cache_of_casts_stays_on_around_compiled_blocks(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs compiled in one state of autocast are compiled again in another."""
    seen: list[bool] = []
    monkeypatch.setattr(blocks, "compiled", lambda forward, *_, **__: forward)
    layer = Layer()
    layer.up.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    task = Task(layer, lambda model, batch: Loss(torch.zeros(())), [Block("", layer)])
    BlockForwards(task, "blocks", make_precision("fp32", CPU)).use_everywhere(way)
    layer(torch.randn(4, 8)).sum().backward()
    assert set(seen) == {True}


def test_the_cache_of_casts_is_on_in_blocks_that_are_never_compiled() -> None:
    """A weight of several calls has one cast, and the same bits of the gradient for every way."""
    found: list[Tensor] = []
    for way in EAGER:
        torch.manual_seed(0)
        layer = Layer()
        task = Task(
            layer, lambda model, batch: Loss(torch.zeros(())), [Block("", layer, compile=False)]
        )
        forwards = BlockForwards(task, "off", make_precision("bf16", CPU))
        forwards.use_everywhere(way)
        with forwards.precision.autocast():
            output = layer(layer(layer(torch.randn(64, 8))))
        found += torch.autograd.grad(output.float().square().sum(), [layer.up.weight])
    assert all(torch.equal(gradient, found[0]) for gradient in found)


class Dropped(nn.Module):
    """Dropout around two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.drop(torch.nn.functional.gelu(self.up(x)))))


def test_compiled_ways_draw_their_random_numbers_once() -> None:
    """torch's partitioner would draw some of them again in the backward pass."""
    model = nn.Sequential(Dropped())
    task = Task(model, lambda model, batch: Loss(torch.zeros(())), (Block("0", model[0]),))
    forwards = BlockForwards(task, "blocks", make_precision("fp32", CPU))
    x = torch.randn(64, 32)

    def results() -> list[Tensor]:
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        weights = [p for p in model.parameters() if p.ndim == 2]
        loss = (output * torch.linspace(0, 1, 32)).sum()
        return [output, *torch.autograd.grad(loss, [inputs, *weights])]

    forwards.use_everywhere(KEEP)
    expected = results()
    for way in (COMPILED[2], COMPILED[4]):
        forwards.use_everywhere(way)
        for got, want in zip(results(), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_attention_without_dropout_draws_nothing() -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.empty(0)
    assert not draws_numbers(attention, (q, q, q), {})
    assert not draws_numbers(attention, (q, q, q, 0.0), {})
    assert draws_numbers(attention, (q, q, q, 0.1), {})
    assert draws_numbers(attention, (q, q, q), {"dropout_p": 0.1})
    assert draws_numbers(torch.ops.aten.native_dropout.default, (q, 0.5, True), {})
    assert not draws_numbers(torch.ops.aten.mm.default, (q, q), {})


def test_a_kept_operator_that_draws_numbers_is_run_again() -> None:
    """What draws after it would draw others if it were not."""

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.5, True)[0].sin() * torch.rand_like(x).sin()

    found = []
    for function in (forward, blocks._checkpointed(forward, ("native_dropout",))):
        torch.manual_seed(0)
        x = torch.ones(50, requires_grad=True)
        found.append(torch.autograd.grad(function(nn.Identity(), x).sum(), x)[0])
    torch.testing.assert_close(*found)
