"""Bytes and times that are counted without a GPU, beside ones computed by hand."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_step import CONFIG, make_fake_step, mean_square
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from fastft.blocks import EAGER, KEEP, RECOMPUTE
from fastft.config import OptimConfig
from fastft.fused import Kernels
from fastft.memory.fake import (
    FakeMeter,
    Speed,
    Unfilled,
    as_on_gpu,
    estimate_costs,
    fake_batch,
    make_fake,
    on_fake_tensors,
)
from fastft.memory.solve import peak_bytes, timeline
from fastft.optim import Optimizer, make_groups, state_bytes
from fastft.task import Batch, Task

CPU = torch.device("cpu")
BATCH, LENGTH, WIDTH, HEADS = 4, 32, 64, 2
ROWS = BATCH * LENGTH


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Transformer(nn.Module):
    """Pre-norm; `x`: [B, L, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@contextlib.contextmanager
def real(meter: FakeMeter) -> Iterator[None]:
    with as_on_gpu(), meter:
        yield


@contextlib.contextmanager
def fake(meter: FakeMeter) -> Iterator[None]:
    with on_fake_tensors(meter):
        yield


both = pytest.mark.parametrize("tensors", [real, fake])


def run(
    tensors: Callable[[FakeMeter], Any], make: Callable[[], nn.Module], *, bf16: bool
) -> tuple[int, int, int]:
    """Bytes kept by a forward, its peak, and the peak of its backward."""
    meter = FakeMeter()
    with tensors(meter):
        model, x = make(), torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
        start = meter.allocated()
        meter.reset_peak()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = model(x)
        kept, forward = meter.allocated() - start, meter.peak() - start
        meter.reset_peak()
        start = meter.allocated()
        y.backward(torch.ones_like(y))
        return kept, forward, meter.peak() - start


@both
def test_an_mlp_keeps_what_its_backward_reads(tensors: Any) -> None:
    kept, forward, backward = run(tensors, Mlp, bf16=False)
    hidden, output = ROWS * 4 * WIDTH * 4, ROWS * WIDTH * 4
    # Before the activation, after it, and what it returns.
    assert kept == 2 * hidden + output
    assert forward == kept
    # Gradients of the output and of the hidden layer, of the last weight and its bias. Then the
    # hidden layer after the activation goes, and makes room for the gradient before it.
    assert backward == output + hidden + 4 * WIDTH * WIDTH * 4 + 512


@both
def test_a_transformer_block_keeps_what_its_backward_reads(tensors: Any) -> None:
    kept, forward, backward = run(tensors, Transformer, bf16=True)
    narrow, wide = ROWS * WIDTH * 2, ROWS * WIDTH * 4
    expected = {
        "norms in bf16, which the matrix products read": 2 * narrow,
        "mean and inverse deviation of both norms": 4 * ROWS * 4,
        "queries, keys, values": 3 * narrow,
        "what the attention mixed, and its log-sums": narrow + ROWS * HEADS * 4,
        "the sum of the first half, in fp32": wide,
        "hidden layer before and after the activation": 8 * narrow,
        "output": wide,
        "weights in bf16": 12 * WIDTH * WIDTH * 2,
    }
    assert kept == sum(expected.values())
    assert forward >= kept
    assert backward > 0


@pytest.mark.parametrize("make", [Mlp, Transformer])
@pytest.mark.parametrize("bf16", [False, True])
def test_fake_tensors_count_as_real_ones(make: Callable[[], nn.Module], bf16: bool) -> None:
    assert run(fake, make, bf16=bf16) == run(real, make, bf16=bf16)


@both
def test_storages_count_once_rounded_until_they_are_freed(tensors: Any) -> None:
    meter = FakeMeter()
    outside = torch.zeros(100)
    with tensors(meter):
        x = torch.zeros(3)
        views = [x[1:], x.view(3, 1), x.detach()]
        assert meter.allocated() == 512
        y = torch.zeros(129)
        assert meter.allocated() == 512 + 1024
        del x, y
        assert meter.allocated() == 512
        assert meter.peak() == 512 + 1024
        meter.reset_peak()
        assert meter.peak() == 512
        meter.hold([outside, outside[1:]])
        assert meter.allocated() == 1024
        views.clear()
    del outside
    assert meter.allocated() == 0


def test_time_is_arithmetic_or_bytes_whichever_takes_longer() -> None:
    meter = FakeMeter(Speed("test", 1e9, {torch.float32: 1e12, torch.bfloat16: 1e13}))
    with on_fake_tensors(meter):
        a, narrow = torch.empty(1000, 1000), torch.empty(1000, 1000, dtype=torch.bfloat16)
        bytes_seconds = 12e6 / 1e9
        assert meter.seconds(lambda: a + a.t(), repeats=3) == pytest.approx(bytes_seconds)
        # 2e9 operations take 2 ms, less than the bytes; with 100 times the bandwidth it is more.
        assert meter.seconds(lambda: a @ a.t(), repeats=3) == pytest.approx(bytes_seconds)
        assert meter.seconds(lambda: a.view(-1).detach(), repeats=3) == 0
        assert meter.seconds(lambda: torch.empty(100), repeats=3) == 0
    meter = FakeMeter(Speed("test", 1e11, {torch.float32: 1e12, torch.bfloat16: 1e13}))
    with on_fake_tensors(meter):
        assert meter.seconds(lambda: a @ a.t(), repeats=3) == pytest.approx(2e-3)
        assert meter.seconds(lambda: narrow @ narrow, repeats=3) == pytest.approx(2e-4)
        q = torch.empty(1, 1, 1000, 100)
        attention = functional.scaled_dot_product_attention
        assert meter.seconds(lambda: attention(q, q, q), 3) == pytest.approx(4e-4)
        meter.pass_time(1e11)
        assert meter.seconds(lambda: meter.pass_time(1e10), 1) == pytest.approx(0.1)


def test_autocast_is_that_of_a_gpu_inside_and_of_a_cpu_after() -> None:
    x = torch.ones(4, 4, dtype=torch.bfloat16)
    norm = nn.LayerNorm(4)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [norm(x), x.softmax(-1), functional.log_softmax(x, dim=1), x.sum(), x.exp()]
            return [value.dtype for value in [*found, x @ x.float()]]

    before = dtypes()
    with as_on_gpu():
        assert dtypes() == [*[torch.float32] * 5, torch.bfloat16]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert x.softmax(-1, dtype=torch.float64).dtype == torch.float64
        assert norm.bfloat16()(x).dtype == torch.bfloat16
    norm.float()
    assert dtypes() == before
    assert before != [*[torch.float32] * 5, torch.bfloat16]


@both
def test_dropout_keeps_one_byte_per_value_and_attention_no_square(tensors: Any) -> None:
    meter = FakeMeter()
    with tensors(meter):
        x = torch.randn(1, 2, 64, 32, requires_grad=True)
        start = meter.allocated()
        y = functional.dropout(x, 0.5)
        assert meter.allocated() - start == 4096 * (4 + 1)
        assert functional.dropout(x, 0.5, training=False) is x
        start = meter.allocated()
        mixed = functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
        z = functional.scaled_dot_product_attention(x, x, x, None, 0.1)
        assert meter.allocated() - start == 2 * (4096 * 4 + 128 * 4)
        (y + mixed + z).sum().backward()


def test_a_fake_model_holds_no_memory_and_keeps_its_ties() -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("offset", torch.zeros(3))
    meter = FakeMeter()
    with on_fake_tensors(meter) as mode:
        make_fake(model, mode, meter)
        batch = fake_batch(Batch({"x": torch.ones(2, 256), "name": "a"}, 2), mode, meter)
        assert model[1].weight is model[0].weight
        assert isinstance(model[0].weight, nn.Parameter)
        assert meter.allocated() == 256 * 256 * 4 + 512 + 2 * 256 * 4
        assert model(batch["x"]).shape == (2, 256)
        assert batch["name"] == "a"


def test_fills_are_skipped() -> None:
    kept = torch.full((8,), 5.0)
    with Unfilled():
        nn.init.uniform_(kept)
        # Scaled, shifted and bounded behind its fill.
        nn.init.trunc_normal_(kept, mean=1.0)
        nn.init.ones_(other := torch.empty(3))
        other.mul_(2)
        # Zeros are skipped in parameters alone; what a buffer holds may be read.
        nn.init.zeros_(weight := nn.Parameter(torch.ones(2)))
        nn.init.zeros_(buffer := torch.ones(2))
    assert kept.tolist() == [5] * 8
    assert other.tolist() == [2, 2, 2]
    assert weight.tolist() == [1, 1]
    assert buffer.tolist() == [0, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "adamw"},
        {"name": "adam", "moments": "bf16"},
        {"name": "adamw", "moments": "8bit"},
        {"name": "sgd"},
        {"name": "rmsprop"},
        {"name": "rmsprop", "momentum": 0.0},
    ],
    ids=str,
)
def test_the_optimizers_state_is_as_large_as_said(settings: dict[str, Any]) -> None:
    config = OptimConfig(lr=0.1, **settings)
    model = nn.Linear(512, 512, bias=False)
    groups = make_groups(Task(model, mean_square), config, {})
    kernels = Kernels(adam=config.moments != "fp32")
    optimizer = Optimizer(groups, config, 10, kernels)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.update(0, torch.ones(()), torch.zeros(()))
    held = sum(x.nbytes for x in tree_leaves(optimizer.state_dict()) if isinstance(x, Tensor))
    assert held == pytest.approx(state_bytes(config) * model.weight.numel(), rel=1e-4)


def test_each_way_of_a_block_runs_once() -> None:
    runs = 0

    class Counted(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            return super().forward(x)

    model = nn.Sequential(nn.Linear(8, WIDTH), Counted(), Counted(), nn.Linear(WIDTH, 8))
    meter = FakeMeter()
    with on_fake_tensors(meter) as mode:
        inputs = torch.zeros(BATCH, 8)
        step, forwards, batches = make_fake_step(model, inputs, mode, meter)
        costs = estimate_costs(CONFIG, step, forwards, batches, meter)
    # All but the first way compute it again in the backward.
    ways = 2 * len(costs.blocks[0].choices) - 1
    capture, rehearsal = 2, 2 * 2
    assert runs == capture + ways + rehearsal


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_whole_menu_of_a_transformer(micro_batches: int) -> None:
    model = nn.Sequential(nn.Linear(8, WIDTH), Transformer(), Transformer(), nn.Linear(WIDTH, 8))
    meter = FakeMeter()
    with on_fake_tensors(meter) as mode:
        inputs = torch.zeros(BATCH, LENGTH, 8)
        step, forwards, batches = make_fake_step(model, inputs, mode, meter, micro_batches)
        before = meter.allocated()
        costs = estimate_costs(CONFIG, step, forwards, batches, meter)
        assert meter.allocated() == before
    weights = sum(p.numel() for p in model.parameters())
    assert [block.name for block in costs.blocks] == ["1", "2"]
    assert costs.blocks[0].choices == costs.blocks[1].choices
    choices = {choice.name: choice for choice in costs.blocks[0].choices}
    assert list(choices) == [way.name for way in EAGER if not way.offload]
    kept = [choice.kept_bytes for choice in choices.values()]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) > 3
    seconds = [choice.seconds for choice in choices.values()]
    assert seconds == sorted(seconds)
    # Recomputing all keeps the output alone, in bf16, as the first layer hands it on.
    assert choices[RECOMPUTE.name].kept_bytes == ROWS * WIDTH * 2
    assert all(choice.forward_bytes >= choice.kept_bytes for choice in choices.values())
    per_block = sum(p.nbytes for p in model[1].parameters())
    assert costs.blocks[0].gradient_bytes == (0 if micro_batches > 1 else per_block)
    everything = 4 * weights * (3 if micro_batches == 1 else 4)
    assert costs.fixed_bytes == pytest.approx(everything, rel=0.1)
    for pick in range(len(choices)):
        moments = timeline(costs, [pick] * 2)
        assert peak_bytes(costs, [pick] * 2) >= max(m.fixed + m.kept for m in moments)
    assert costs.other_seconds > costs.update_seconds > 0
    assert choices[KEEP.name].seconds > 0
