"""Attention over weighted keys: values, first and second derivatives against float64 autograd."""

from collections.abc import Callable

import pytest
import torch
from fastft_kernels.weighted_attention import (
    plain_backward,
    plain_double_backward,
    reference,
    weighted_attention,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HEADS, SCALE = 2, 0.3
SIZES = {"odd": (3, 7, 16), "one": (2, 1, 16), "sixteen": (1, 16, 32), "none": (0, 5, 16)}
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def make(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """qkv, log weights with a key left out, and the gradient of the output."""
    samples, tokens, columns = size
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(samples, tokens, 3 * HEADS * columns, generator=draw)
    weights = torch.randn(samples, tokens, generator=draw)
    if tokens > 2:
        weights[:, 1] = -80.0
    dy = torch.randn(samples, tokens, HEADS * columns, generator=draw)
    return [x.to(device, dtype) for x in (qkv, weights, dy)]


def derivatives(op: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    """Of a loss on the output and on the first derivatives, as that of energies and forces."""
    qkv, weights, dy = (x.detach().clone().requires_grad_() for x in inputs)
    y = op(qkv, weights, HEADS, SCALE)
    first = torch.autograd.grad(y, (qkv, weights), dy, create_graph=True)
    loss = y.sin().sum() + sum(g.cos().sum() for g in first)
    second = torch.autograd.grad(loss, (qkv, weights, dy))
    names = ("y", "dqkv", "dweights", "of qkv", "of weights", "of dy")
    return {n: v.detach() for n, v in zip(names, (y, *first, *second), strict=True)}


@by_size
def test_two_derivatives(size, device):
    inputs = make(size, torch.float32, device)
    truth = derivatives(reference, [x.double() for x in inputs])
    plain = derivatives(reference, inputs)
    for name, got in derivatives(weighted_attention, inputs).items():
        assert not got.isnan().any()
        error, eager = ((x.double() - truth[name]).norm() for x in (got, plain[name]))
        assert error <= 3 * eager + 1e-6 * truth[name].norm(), name


def test_float64_takes_plain_torch(device):
    inputs = make((2, 5, 16), torch.float64, device)
    for name, value in derivatives(reference, inputs).items():
        torch.testing.assert_close(derivatives(weighted_attention, inputs)[name], value)


def test_same_bits_twice(device):
    inputs = make((2, 7, 16), torch.float32, device)
    first, second = (derivatives(weighted_attention, inputs) for _ in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_one_graph_holds_the_first_derivative(device):
    """As the block of PET: the gradient is taken inside, the compiler sees it."""
    inputs = make((2, 7, 16), torch.float32, device)

    def inner(qkv: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        y = weighted_attention(qkv, weights, HEADS, SCALE)
        (slope,) = torch.autograd.grad(y.square().sum(), [weights], create_graph=True)
        return y, slope

    found = []
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for function in (inner, torch.compile(inner, fullgraph=True, backend="aot_eager")):
            qkv, weights = (x.clone().requires_grad_() for x in inputs[:2])
            y, slope = function(qkv, weights)
            loss = y.sin().sum() + slope.cos().sum()
            found.append([y, slope, *torch.autograd.grad(loss, (qkv, weights))])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_third_derivatives_are_refused(device):
    qkv, weights, dy = (x.requires_grad_() for x in make((1, 3, 16), torch.float32, device))
    y = weighted_attention(qkv, weights, HEADS, SCALE)
    (first,) = torch.autograd.grad(y, qkv, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(first.square().sum(), qkv, create_graph=True)


def test_opcheck(device):
    qkv, weights, dy = (x.requires_grad_() for x in make((1, 3, 16), torch.float32, device))
    ops = torch.ops.fastft
    torch.library.opcheck(ops.weighted_attention_forward.default, (qkv, weights, HEADS, SCALE))
    backward = ops.weighted_attention_backward.default
    torch.library.opcheck(backward, (dy, qkv, weights, HEADS, SCALE))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("forward", reference),
        ("backward", plain_backward),
        ("double_backward", plain_double_backward),
    ],
)
def test_operations_are_counted(name: str, plain: Callable[..., object], device):
    """As of plain torch: a planner must not think ours free to compute again."""
    qkv, weights, dy = make((3, 7, 16), torch.float32, device)
    before = {"forward": (), "backward": (dy,), "double_backward": (qkv, weights, dy)}[name]
    op = getattr(torch.ops.fastft, f"weighted_attention_{name}")
    counts = []
    for function in (op, plain):
        with FlopCounterMode(display=False) as counter:
            function(*before, qkv, weights, HEADS, SCALE)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        (((2, 3, 97), (2, 3)), "reshape them"),
        (((2, 3, 96), (2, 4)), "reshape them"),
        (((2, 65, 96), (2, 65)), "use plain torch"),
        (((2, 3, 48), (2, 3)), "use plain torch"),
    ],
)
def test_wrong_inputs_are_named(shapes, part, device):
    qkv, weights = (torch.zeros(shape, device=device) for shape in shapes)
    with pytest.raises(ValueError, match=part):
        weighted_attention(qkv, weights, HEADS, SCALE)
