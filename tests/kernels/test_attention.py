"""Attention in windows and over few tokens: float64 truth, opcheck, one graph, the same bits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastft_kernels import short_attention, window_attention
from fastft_kernels.device import interpret_on_cpu
from fastft_kernels.short_attention import reference as short_reference
from fastft_kernels.window_attention import SMALL_TOKENS
from fastft_kernels.window_attention import reference as window_reference
from fastft_kernels.window_grid import Grid
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
HEADS = 2


@dataclass(frozen=True)
class Case:
    """An op, its reference, and the shapes of its tensors; the rest of its arguments follow.

    Attributes:
        last: behind a second tensor, if any, of an op that takes only the first before the rest.
        products: that its backward computes.
    """

    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    rest: tuple[Any, ...]
    last: tuple[Any, ...] = ()
    products: int = 5

    def inputs(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for shape in self.shapes]

    def arguments(self, inputs: list[Tensor]) -> tuple[Any, ...]:
        before = 1 if self.last else len(inputs)
        return (*inputs[:before], *self.rest, *inputs[before:], *self.last)

    def gradient(self, inputs: list[Tensor]) -> Tensor:
        """Random, of the output; in 16 bits torch's attention on a GPU takes no empty tensors."""
        whole = self.reference(*self.arguments([x.float() for x in inputs]))
        return torch.randn_like(whole).to(inputs[0].dtype)

    def run(self, op: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
        """Output and gradients."""
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = op(*self.arguments(leaves))
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def _window(
    size: Any,
    window: Any,
    shift: Any,
    batch: int = 1,
    heads: int = HEADS,
    bias: bool = False,
    wraps: bool = True,
) -> Case:
    grid = Grid(size, window, shift)
    tensors = ((batch, *grid.padded, 3 * heads * 16), (heads, grid.tokens, grid.tokens))
    return Case(
        window_attention,
        window_reference,
        tensors if bias else tensors[:1],
        (heads, size, window, shift),
        (wraps,) if bias else (None, wraps),
        5 if grid.tokens <= SMALL_TOKENS else 7,
    )


def _short(queries: int, keys: int, samples: int, shared: bool) -> Case:
    shapes = (1 if shared else samples, queries, HEADS * 16), (samples, keys, 2 * HEADS * 16)
    return Case(short_attention, short_reference, shapes, (HEADS,))


CASES = {
    "windows": _window((2, 4, 4), (2, 2, 4), (0, 0, 0), batch=2),
    "shifted": _window((4, 4, 4), (2, 2, 2), (1, 1, 1), heads=1),
    "padded": _window((2, 3, 5), (2, 2, 4), (0, 0, 0)),
    "padded, shifted": _window((2, 3, 5), (2, 2, 4), (0, 1, 2)),
    "two axes": _window((4, 2, 5), (2, 2, 4), (1, 0, 2)),
    "padded along the first axis": _window((3, 1, 3), (2, 1, 2), (1, 0, 1), batch=2, heads=1),
    # 36 tokens are a main part and a tail.
    "tail": _window((6, 3, 7), (3, 3, 4), (1, 0, 2), heads=1),
    "Aurora's": _window((2, 6, 13), (2, 6, 12), (0, 0, 6), heads=1),
    # Of more tokens than one program has whole.
    "shifted, large": _window((2, 18, 4), (2, 9, 4), (0, 4, 0), heads=1),
    "a power of two, large": _window((4, 8, 4), (4, 8, 4), (0, 0, 0), heads=1),
    "ends apart": _window((2, 4, 8), (1, 2, 4), (0, 1, 2), wraps=False),
    "ends apart, padded": _window((2, 3, 5), (2, 2, 4), (0, 1, 2), wraps=False),
    "bias": _window((1, 4, 6), (1, 2, 3), (0, 0, 0), batch=2, bias=True, wraps=False),
    "bias, shifted": _window((1, 6, 6), (1, 3, 3), (0, 1, 1), bias=True, wraps=False),
    "bias, padded": _window((2, 3, 5), (2, 2, 4), (0, 1, 2), heads=1, bias=True),
    "bias, tail": _window((6, 3, 7), (3, 3, 4), (1, 0, 2), heads=1, bias=True),
    "Swin's": _window((1, 14, 14), (1, 7, 7), (0, 3, 3), heads=1, bias=True, wraps=False),
    "no samples, bias": _window((1, 2, 2), (1, 2, 2), (0, 0, 0), batch=0, bias=True),
    "no samples": _window((2, 4, 4), (2, 2, 4), (0, 0, 0), batch=0),
    "decoder": _short(13, 3, 7, shared=True),
    "encoder": _short(3, 13, 7, shared=True),
    "own queries": _short(5, 17, 9, shared=False),
    "one each": _short(1, 1, 1, shared=False),
    "none": _short(3, 2, 0, shared=True),
}
# What the interpreter is slow at: few programs, for all that does not depend on sizes.
SMALL = {
    "windows": _window((1, 2, 3), (1, 2, 2), (0, 0, 1), heads=1),
    "bias": _window((1, 2, 4), (1, 2, 2), (0, 0, 1), heads=1, bias=True, wraps=False),
    "shared queries": _short(3, 2, 2, shared=True),
    "own queries": _short(2, 3, 2, shared=False),
}
COUNTED = {**SMALL, "large": CASES["shifted, large"]}
by_small = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
SOME = ("two axes", "tail", "shifted, large", "bias, shifted", "Swin's", "decoder", "own queries")
SOME = {name: CASES[name] for name in SOME}
# Both kinds of 16 bits take the same path.
TESTED = {torch.float32: CASES, torch.bfloat16: CASES, torch.float16: SOME}
PAIRS = {f"{name}, {dtype}": (each, dtype) for dtype in EPS for name, each in TESTED[dtype].items()}


@pytest.mark.parametrize(("case", "dtype"), PAIRS.values(), ids=PAIRS)
def test_error_is_at_most_twice_the_eager_one(case: Case, dtype, device):
    if dtype is torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    inputs = case.inputs(dtype, device)
    dy = case.gradient(inputs)
    truths = case.run(case.reference, [x.double() for x in inputs], dy.double())
    eager = case.run(case.reference, inputs, dy) if dy.numel() else truths
    fused = case.run(case.op, inputs, dy)
    for got, plain, truth in zip(fused, eager, truths, strict=True):
        assert got.shape == truth.shape
        assert got.dtype == dtype
        assert not got.isnan().any()
        rounding = 8 * EPS[dtype] * float(truth.norm())
        assert (got.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + rounding


@pytest.mark.parametrize("case", ["Aurora's", "Swin's"])
def test_small_gradients_are_lost_in_float16_where_they_are_stored_alone(case: str, device):
    """Not before, where a product takes a probability times the gradient of a score."""
    found = CASES[case]
    inputs = [0.3 * x for x in found.inputs(torch.float16, device)]
    dy = 1e-3 * found.gradient(inputs)
    truth = found.run(found.reference, [x.double() for x in inputs], dy.double())[1]
    dqkv = found.run(found.op, inputs, dy)[1].double()
    stored = truth.half().double()
    for got, best, want in zip(*(x.chunk(3, -1) for x in (dqkv, stored, truth)), strict=True):
        assert (got - want).norm() <= 1.6 * (best - want).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize("shift", [0, 3])
def test_programs_go_over_many_windows(shift: int, columns: int, dtype, device):
    if columns == 128 and dtype is torch.float32:
        pytest.skip("not taken")
    heads, rest = 4, (4, (1, 28, 28), (1, 7, 7), (0, shift, shift))
    shapes = ((20, 1, 28, 28, 3 * heads * columns), (heads, 49, 49))
    case = Case(window_attention, window_reference, shapes, rest, (False,))
    inputs = case.inputs(dtype, device)
    inputs[1] = inputs[1].float()
    dy = case.gradient(inputs)
    truths = case.run(case.reference, [x.double() for x in inputs], dy.double())
    eager, fused, again = (case.run(op, inputs, dy) for op in (case.reference, case.op, case.op))
    for got, plain, truth, same in zip(fused, eager, truths, again, strict=True):
        rounding = 8 * EPS[dtype] * float(truth.norm())
        assert (got.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + rounding
        assert torch.equal(got, same)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_bias_keeps_float32_beside_16_bits(frozen: bool, device):
    case = CASES["bias, shifted"]
    qkv, bias = case.inputs(torch.float16, device)
    # What float16 has not: a tenth beside a thousand.
    bias = (1000 + 0.1 * bias.float()).requires_grad_(not frozen)
    same, dy = torch.zeros_like(qkv).requires_grad_(), case.gradient([qkv, bias.half()])
    y = case.op(*case.arguments([qkv, bias]))
    truth = case.reference(*case.arguments([qkv.double(), bias.double()]))
    eager = case.reference(*case.arguments([qkv, bias.half()]))
    assert (y - truth).norm() < 0.1 * (eager - truth).norm()
    leaves = [same] if frozen else [same, bias]
    grads = torch.autograd.grad(case.op(*case.arguments([same, bias])), leaves, dy)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("name", ["two axes", "bias, shifted", "decoder", "own queries"])
def test_same_bits_twice(name: str, device):
    case = CASES[name]
    inputs = case.inputs(torch.float16, device)
    dy = case.gradient(inputs)
    first, second = (case.run(case.op, inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@by_small
def test_one_graph_with_gradients(case: Case, device):
    inputs = case.inputs(torch.float32, device)
    dy = case.gradient(inputs)
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    pairs = zip(case.run(compiled, inputs, dy), case.run(case.op, inputs, dy), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@by_small
def test_second_derivatives(case: Case, device):
    """create_graph=True, as forces need."""
    inputs = case.inputs(torch.float32, device)
    found = []
    for op, dtype in ((case.op, torch.float32), (case.reference, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        with sdpa_kernel(SDPBackend.MATH):
            total = op(*case.arguments(leaves)).sin().sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        loss = torch.stack([g.square().sum() for g in grads]).sum()
        found.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@by_small
def test_views(case: Case, device):
    inputs = case.inputs(torch.float32, device)
    dy = case.gradient(inputs)
    spread = [torch.stack([x, -x], -1)[..., 0] for x in inputs]
    leaves = [x.requires_grad_() for x in spread]
    y = case.op(*case.arguments(leaves))
    grads = torch.autograd.grad(y, leaves, dy.transpose(0, -1).contiguous().transpose(0, -1))
    for got, want in zip([y, *grads], case.run(case.op, inputs, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@by_small
def test_opcheck(case: Case, device):
    name = "window" if case.op is window_attention else "short"
    inputs = [x.requires_grad_() for x in case.inputs(torch.float32, device)]

    def arguments(inputs: list[Tensor]) -> list[Any]:
        return [list(x) if isinstance(x, tuple) else x for x in case.arguments(inputs)]

    forward = getattr(torch.ops.fastft, f"{name}_attention_forward").default
    torch.library.opcheck(forward, tuple(arguments(inputs)))
    with torch.no_grad():
        dy = torch.randn_like(forward(*arguments(inputs)))
    backward = getattr(torch.ops.fastft, f"{name}_attention_backward").default
    torch.library.opcheck(backward, (dy, *arguments([x.detach() for x in inputs])))


@by_small
def test_selective_checkpointing_sees_the_op(case: Case, device):
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names():
        case.op(*case.arguments(case.inputs(torch.float32, device)))
    assert any(name.startswith("fastft::") for name in seen)


@pytest.mark.parametrize("case", COUNTED.values(), ids=COUNTED)
def test_operations_are_counted(case: Case, device, kernels_for_real):
    """As of torch's attention: a planner must not think ours free to compute again."""
    interpret_on_cpu(False)
    inputs = case.inputs(torch.float32, device)
    dy = case.gradient(inputs)
    counts = []
    for op in (case.op, case.reference):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            y = op(*case.arguments(leaves))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y, leaves, dy)
        counts.append((counter.get_total_flops(), backward.get_total_flops()))
    ours, theirs = counts
    assert ours[0] == theirs[0]
    # They keep the probabilities, and compute four products.
    assert ours[1] * 4 == theirs[1] * case.products


WRONG = {
    "pad it behind": (window_attention, [(1, 4, 5, 9, 96)], (2, (4, 5, 9), (2, 3, 4), (0, 0, 0))),
    "a shift must be less": (
        window_attention,
        [(1, 2, 4, 8, 96)],
        (2, (2, 4, 8), (2, 2, 4), (1, 0, 0)),
    ),
    "got 144 and 128": (window_attention, [(1, 2, 6, 12, 384)], (1, (2, 6, 12), (2, 6, 12))),
    "at most 256": (window_attention, [(1, 8, 8, 8, 96)], (2, (8, 8, 8), (8, 8, 8), (0, 0, 0))),
    "got torch.int64": (window_attention, [(1, 2, 3, 4, 96)], (2, (2, 3, 4), (2, 3, 4))),
    "with a bias a window": (
        window_attention,
        [(1, 2, 8, 8, 96), (2, 128, 128)],
        (2, (2, 8, 8), (2, 8, 8), (0, 0, 0)),
    ),
    r"the bias must be \[2, 4, 4\]": (
        window_attention,
        [(1, 1, 2, 2, 96), (1, 4, 4)],
        (2, (1, 2, 2), (1, 2, 2), (0, 0, 0)),
    ),
    "reshape or cast it": (
        window_attention,
        [(1, 1, 2, 2, 96), (2, 4, 4)],
        (2, (1, 2, 2), (1, 2, 2), (0, 0, 0)),
    ),
    "reshape them": (short_attention, [(2, 3, 32), (4, 3, 64)], (2,)),
    "use torch's attention": (short_attention, [(1, 3, 32), (4, 65, 64)], (2,)),
    "cast them": (short_attention, [(1, 3, 32), (4, 3, 64)], (2,)),
}


@pytest.mark.parametrize("part", WRONG)
def test_wrong_inputs_are_named(part: str, device):
    op, shapes, rest = WRONG[part]
    inputs = [torch.zeros(shape, device=device) for shape in shapes]
    if part in ("got torch.int64", "cast them", "reshape or cast it"):
        inputs[-1] = inputs[-1].long()
    before = 1 if op is window_attention else 2
    with pytest.raises(ValueError, match=part):
        op(*inputs[:before], *rest, *inputs[before:])
