"""Saved tensors on the host: the same bits, each storage once, and nothing held too long."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastft import offload
from fastft.blocks import KEEP, LEAST, OFFLOAD, RECOMPUTE, BlockForwards, Way
from fastft.errors import PlanError
from fastft.offload import Host
from fastft.precision import make_precision
from fastft.task import Block, Loss, Task

CPU = torch.device("cpu")
WIDTH, ROWS = 16, 24
# Of a float32 tensor [ROWS, WIDTH], and of the buffer that holds it.
ACTIVATION, BUFFER = 4 * ROWS * WIDTH, 2048
both_ways = pytest.mark.parametrize("way", [OFFLOAD, LEAST], ids=lambda way: way.name)


@pytest.fixture(autouse=True)
def _small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_LEAST_BYTES", 512)


class Mixed(nn.Module):
    """Views of one storage, dropout, a batch norm, a checkpoint inside, and changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)

    def inner(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(x)).sigmoid()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (3, 2, -1)).permute(1, 2, 0, 3).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        y = cast(Tensor, checkpoint(self.inner, mixed, use_reentrant=False))
        y = torch.relu_(torch.sub(y, 0.5)).tanh().neg()
        # Saved here and, changed, below; the backward pass needs the second.
        y.cos()
        y = y.add_(1).sin()
        return x + (y if scale is None else y * scale)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


def make(block: Callable[[], nn.Module], depth: int = 3, mode: str = "off", name: str = "fp32"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(block() for _ in range(depth)))
    blocks = tuple(Block(str(i), model[i]) for i in range(1, depth + 1))
    task = Task(model, lambda model, batch: Loss(torch.zeros(())), blocks)
    return model, BlockForwards(task, mode, make_precision(name, CPU))


def data(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor, precision: str = "fp32") -> Tensor:
    torch.manual_seed(2)
    with make_precision(precision, CPU).autocast():
        return model(x).float().square().mean()


def results(model: nn.Module, *, retain: bool = False, precision: str = "fp32") -> list[Tensor]:
    """Gradients of two micro-batches, their losses, and the buffers after them."""
    model.zero_grad()
    found = []
    for seed in (1, 3):
        loss = loss_of(model, data(seed), precision)
        loss.backward(retain_graph=retain)
        if retain:
            loss.backward()
        found.append(loss.detach())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*found, *gradients, *(b.clone() for b in model.buffers())]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@both_ways
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("block", [Mixed, Plain])
def test_the_bits_are_those_of_keeping_all(
    block: Callable[[], nn.Module], precision: str, retain: bool, way: Way
) -> None:
    model, _ = make(block)
    expected = results(model, retain=retain, precision=precision)
    model, forwards = make(block)
    forwards.use_everywhere(way)
    assert_same_bits(results(model, retain=retain, precision=precision), expected)
    assert forwards.host.pinned_bytes > 0
    assert forwards.host.held_bytes == 0
    # Ways of other blocks in between, and the same buffers at the next step.
    pinned = forwards.host.pinned_bytes
    for ways in ({"2": KEEP.name}, {"2": way.name, "3": RECOMPUTE.name}, {"3": way.name}):
        forwards.use(ways)
        model.load_state_dict(make(block)[0].state_dict())
        assert_same_bits(results(model, retain=retain, precision=precision), expected)
    assert forwards.host.pinned_bytes == pinned


def test_what_goes_to_the_host() -> None:
    """Of a recomputed block its input; of another what it saves, but no weight."""
    model, forwards = make(Plain, depth=1)
    forwards.use_everywhere(LEAST)
    loss = loss_of(model, data())
    assert forwards.host.held_bytes == BUFFER
    del loss
    assert forwards.host.held_bytes == 0
    forwards.use_everywhere(OFFLOAD)
    loss = loss_of(model, data())
    # The input, and the hidden layer before and after its activation.
    assert forwards.host.held_bytes == BUFFER + 2 * 4 * BUFFER
    loss.backward()
    assert forwards.host.held_bytes == 0
    with torch.no_grad():
        loss_of(model, data())
    assert forwards.host.held_bytes == 0
    assert forwards.host.pinned_bytes == BUFFER + 2 * 4 * BUFFER


class Qkv(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = x.repeat(1, 3).chunk(3, dim=1)
        return q * k * v * mask


def test_a_storage_goes_once_and_what_others_hold_stays() -> None:
    host = Host(CPU)
    x, mask = data().requires_grad_() * 1, data(2)
    out = host.offloaded(lambda module, *inputs: module(*inputs))(Qkv(), x, mask)
    # The tripled input and the first product; not the mask.
    assert host.held_bytes == 4 * BUFFER + BUFFER
    out.sum().backward()
    assert host.held_bytes == 0


def test_small_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_LEAST_BYTES", ACTIVATION + 1)
    model, forwards = make(Plain)
    forwards.use_everywhere(LEAST)
    assert_same_bits(results(model), results(make(Plain)[0]))
    assert forwards.host.pinned_bytes == 0


def alive(references: list[weakref.ref[Any]]) -> list[bool]:
    return [reference() is not None for reference in references]


def storage_of(tensor: Tensor) -> weakref.ref[Any]:
    return weakref.ref(tensor.untyped_storage())


def test_the_device_gives_up_inputs_and_has_at_most_two_again() -> None:
    model, forwards = make(Plain, depth=4)
    forwards.use_everywhere(LEAST)
    gc.disable()
    try:
        x, seen = model[0](data()), []
        for block in list(model)[1:]:
            seen.append(storage_of(x))
            x = block(x)
        assert alive([*seen, storage_of(x)]) == [False] * 4 + [True]
        fetched: list[int] = []

        def count(gradient: Tensor) -> None:
            copies = [o for o in gc.get_objects() if type(o) is offload._Copy]
            fetched.append(sum(copy.back is not None for copy in copies))

        for i in range(1, 5):
            model.get_parameter(f"{i}.down.weight").register_hook(count)
        x.sum().backward()
    finally:
        gc.enable()
    # Its own, and the one before it.
    assert fetched == [2, 2, 2, 1]


@both_ways
def test_backward_in_another_order(way: Way) -> None:
    """Two graphs that share no block but the stem, gone through from the first."""

    def run(chosen: Way) -> list[Tensor]:
        model, forwards = make(Plain, depth=4)
        forwards.use_everywhere(chosen)
        stem = model[0](data())
        losses = [model[i](model[i + 1](stem)).square().mean() for i in (1, 3)]
        for loss in losses:
            loss.backward(retain_graph=loss is losses[0])
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_same_bits(run(way), run(KEEP))


@both_ways
def test_a_block_that_is_called_again_and_one_whose_output_is_unused(way: Way) -> None:
    def run(chosen: Way) -> list[Tensor]:
        model, forwards = make(Plain, depth=2)
        forwards.use_everywhere(chosen)
        x = model[0](data())
        model[2](x)
        x = model[1](model[2](model[1](x)))
        x.square().mean().backward()
        assert forwards.host.held_bytes == 0
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_same_bits(run(way), run(KEEP))


class Fails(Plain):
    """Fails in the forward or the backward pass where it is told to."""

    forward_fails = backward_fails = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.forward_fails:
            raise ValueError("forward")
        if y.requires_grad:
            y.register_hook(self.check)
        return y

    def check(self, gradient: Tensor) -> None:
        if self.backward_fails:
            raise ValueError("backward")


@both_ways
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_fails_leaves_nothing(where: str, way: Way) -> None:
    model, forwards = make(Fails)
    expected = results(model)
    forwards.use_everywhere(way)
    setattr(model[2], f"{where}_fails", True)
    with pytest.raises(ValueError, match=where):
        results(model)
    assert forwards.host.held_bytes == 0
    setattr(model[2], f"{where}_fails", False)
    assert_same_bits(results(model), expected)
    # Nor does a forward without a backward.
    loss_of(model, data())
    assert forwards.host.held_bytes == 0
    assert_same_bits(results(model), expected)


class Late(Host):
    """As a device at its slowest: copies are made when they are waited for, not before.

    It fails where memory that a copy reads or writes was freed before.
    """

    def __init__(self) -> None:
        super().__init__(CPU)
        self.asked: list[tuple[weakref.ref[Any], weakref.ref[Any], int]] = []
        self.made = 0

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        self.asked += [(storage_of(to), storage_of(source), to.nbytes) for to, source in pairs]
        return len(self.asked)

    def wait(self, end: Any) -> None:
        for target, source, size in self.asked[self.made : end]:
            bytes_of(target)[:size].copy_(bytes_of(source)[:size])
        self.made = max(self.made, end or 0)


def bytes_of(storage: weakref.ref[Any]) -> Tensor:
    alive = storage()
    assert alive is not None, "freed while a copy was on its way"
    return torch.empty(0, dtype=torch.uint8).set_(alive)


@both_ways
@pytest.mark.parametrize("block", [Mixed, Plain])
def test_every_copy_is_waited_for_while_its_memory_is_there(
    block: Callable[[], nn.Module], way: Way
) -> None:
    model, _ = make(block)
    expected = [results(model) for _ in range(2)]
    model, forwards = make(block)
    forwards.host = late = Late()
    forwards.use_everywhere(way)
    for want in expected:
        assert_same_bits(results(model), want)
    # A forward that is given up, and a backward, while copies are on their way.
    loss_of(model, data())
    with pytest.raises(ValueError, match="given up"):
        give_up(model)
    assert late.held_bytes == 0
    assert late.made == len(late.asked)


def give_up(model: nn.Sequential) -> None:
    def hook(gradient: Tensor) -> None:
        raise ValueError("given up")

    x = model[0](data())
    for layer in list(model)[1:]:
        x.register_hook(hook)
        x = layer(x)
    x.sum().backward()


class Changes(nn.Module):
    """Changes in place what its backward needs."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y.sin()
        y.add_(1)
        return z


def test_a_saved_tensor_that_was_changed_is_refused() -> None:
    model, forwards = make(Changes)
    for way in (KEEP, OFFLOAD):
        forwards.use_everywhere(way)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            results(model)
    model, forwards = make(Plain, depth=1)
    forwards.use_everywhere(OFFLOAD)
    loss = loss_of(model, data())
    with torch.no_grad():
        model.get_parameter("1.up.weight").add_(1)
        model.get_parameter("1.down.weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_host_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "available_bytes", lambda: 2 * 3 * BUFFER)
    model, forwards = make(Plain)
    forwards.use_everywhere(LEAST)
    expected = results(model)
    forwards.use_everywhere(OFFLOAD)
    with pytest.raises(PlanError, match="must fit half of its free memory"):
        results(model)
    assert forwards.host.held_bytes == 0
    forwards.use_everywhere(LEAST)
    assert_same_bits(results(model), expected)
    assert forwards.host.pinned_bytes == 3 * BUFFER
    # Free buffers of other sizes give way.
    host = Host(CPU)
    host.give_back(host.take(2 * BUFFER))
    assert sum(host.take(BUFFER).nbytes for _ in range(3)) == host.pinned_bytes


def test_the_host_has_memory() -> None:
    assert 2**20 < offload.available_bytes() < 2**50


def test_compiled_blocks() -> None:
    """In one test, since each graph takes Inductor a second or more on a CPU."""

    class Dropped(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(super().forward(x).sin(), 0.2, self.training)

    torch._dynamo.reset()
    counters.clear()
    model, forwards = make(Dropped, mode="blocks")
    # First, so that it is compiled while tensors are watched.
    forwards.use_everywhere(OFFLOAD)
    ours = results(model)
    made = counters["stats"]["unique_graphs"]
    held = forwards.host.pinned_bytes
    assert held > 3 * BUFFER
    forwards.use_everywhere(KEEP)
    expected = results(model)
    assert_same_bits(ours, expected)
    for way in (LEAST, RECOMPUTE, OFFLOAD):
        forwards.use_everywhere(way)
        assert_same_bits(results(model), expected)
    assert forwards.host.held_bytes == 0
    assert counters["stats"]["unique_graphs"] == made
    assert not counters["graph_break"]
