"""Attention in windows and over few tokens: float64 truth, opcheck, one graph, the same bits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastft_kernels import short_attention, window_attention
from fastft_kernels.device import interpret_on_cpu
from fastft_kernels.short_attention import reference as short_reference
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
    """An op, its reference, and the shapes of its tensors; the rest of its arguments follow."""

    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    rest: tuple[Any, ...]

    def inputs(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for shape in self.shapes]

    def run(self, op: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
        """Output and gradients."""
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = op(*leaves, *self.rest)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def _window(size: Any, window: Any, shift: Any, batch: int = 1, heads: int = HEADS) -> Case:
    shape = (batch, *Grid(size, window, shift).padded, 3 * heads * 16)
    return Case(window_attention, window_reference, (shape,), (heads, size, window, shift))


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
    "shared queries": _short(3, 2, 2, shared=True),
    "own queries": _short(2, 3, 2, shared=False),
}
by_small = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
SOME = {name: CASES[name] for name in ("two axes", "tail", "decoder", "own queries")}
# Both kinds of 16 bits take the same path.
TESTED = {torch.float32: CASES, torch.bfloat16: CASES, torch.float16: SOME}
PAIRS = {f"{name}, {dtype}": (each, dtype) for dtype in EPS for name, each in TESTED[dtype].items()}


@pytest.mark.parametrize(("case", "dtype"), PAIRS.values(), ids=PAIRS)
def test_error_is_at_most_twice_the_eager_one(case: Case, dtype, device):
    if dtype is torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    inputs = case.inputs(dtype, device)
    dy = torch.randn_like(case.reference(*inputs, *case.rest))
    truths = case.run(case.reference, [x.double() for x in inputs], dy.double())
    eager, fused = (case.run(op, inputs, dy) for op in (case.reference, case.op))
    for got, plain, truth in zip(fused, eager, truths, strict=True):
        assert got.shape == truth.shape
        assert got.dtype == dtype
        assert not got.isnan().any()
        rounding = 8 * EPS[dtype] * float(truth.norm())
        assert (got.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + rounding


@pytest.mark.parametrize("name", ["two axes", "decoder", "own queries"])
def test_same_bits_twice(name: str, device):
    case = CASES[name]
    inputs = case.inputs(torch.float16, device)
    dy = torch.randn_like(case.reference(*inputs, *case.rest))
    first, second = (case.run(case.op, inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@by_small
def test_one_graph_with_gradients(case: Case, device):
    inputs = case.inputs(torch.float32, device)
    dy = torch.randn_like(case.reference(*inputs, *case.rest))
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
            total = op(*leaves, *case.rest).sin().sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        loss = torch.stack([g.square().sum() for g in grads]).sum()
        found.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@by_small
def test_views(case: Case, device):
    inputs = case.inputs(torch.float32, device)
    dy = torch.randn_like(case.reference(*inputs, *case.rest))
    spread = [torch.stack([x, -x], -1)[..., 0] for x in inputs]
    leaves = [x.requires_grad_() for x in spread]
    y = case.op(*leaves, *case.rest)
    grads = torch.autograd.grad(y, leaves, dy.transpose(0, -1).contiguous().transpose(0, -1))
    for got, want in zip([y, *grads], case.run(case.op, inputs, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@by_small
def test_opcheck(case: Case, device):
    name = "window" if case.op is window_attention else "short"
    inputs = [x.requires_grad_() for x in case.inputs(torch.float32, device)]
    rest = [list(each) if isinstance(each, tuple) else each for each in case.rest]
    forward = getattr(torch.ops.fastft, f"{name}_attention_forward").default
    torch.library.opcheck(forward, (*inputs, *rest))
    with torch.no_grad():
        dy = torch.randn_like(forward(*inputs, *rest))
    backward = getattr(torch.ops.fastft, f"{name}_attention_backward").default
    torch.library.opcheck(backward, (dy, *(x.detach() for x in inputs), *rest))


@by_small
def test_selective_checkpointing_sees_the_op(case: Case, device):
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names():
        case.op(*case.inputs(torch.float32, device), *case.rest)
    assert any(name.startswith("fastft::") for name in seen)


@by_small
def test_operations_are_counted(case: Case, device, kernels_for_real):
    """As of torch's attention: a planner must not think ours free to compute again."""
    interpret_on_cpu(False)
    inputs = case.inputs(torch.float32, device)
    dy = torch.randn_like(case.reference(*inputs, *case.rest))
    counts = []
    for op in (case.op, case.reference):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            y = op(*leaves, *case.rest)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y, leaves, dy)
        counts.append((counter.get_total_flops(), backward.get_total_flops()))
    ours, theirs = counts
    assert ours[0] == theirs[0]
    # They keep the probabilities, and compute four products.
    assert ours[1] * 4 == theirs[1] * (7 if case.op is window_attention else 5)


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
    "reshape them": (short_attention, [(2, 3, 32), (4, 3, 64)], (2,)),
    "use torch's attention": (short_attention, [(1, 3, 32), (4, 65, 64)], (2,)),
    "cast them": (short_attention, [(1, 3, 32), (4, 3, 64)], (2,)),
}


@pytest.mark.parametrize("part", WRONG)
def test_wrong_inputs_are_named(part: str, device):
    op, shapes, rest = WRONG[part]
    inputs = [torch.zeros(shape, device=device) for shape in shapes]
    if part in ("got torch.int64", "cast them"):
        inputs[-1] = inputs[-1].long()
    with pytest.raises(ValueError, match=part):
        op(*inputs, *rest)
