"""Every op of the catalog: float64 truth, opcheck, one graph, the same bits twice."""

import pytest
import torch
from fastft_kernels.catalog import CATALOG, OpCase, as_tuple, values_and_grads

by_name = pytest.mark.parametrize("case", CATALOG, ids=lambda case: case.name)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS_NORM = 1e-5
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.detach().double() - truth.detach()).norm())


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_the_eager_one(case: OpCase, dtype, device):
    for shape in case.shapes:
        inputs = case.make_inputs(shape, dtype, device)
        grads = [torch.randn_like(y).to(dtype) for y in as_tuple(case.reference(*inputs))]
        doubles = [x.detach().double() for x in inputs]
        truths = values_and_grads(case.reference, doubles, [g.double() for g in grads])
        eager = values_and_grads(case.reference, inputs, grads)
        fused = values_and_grads(case.op, inputs, grads)
        for got, plain, truth in zip(fused, eager, truths, strict=True):
            assert got.shape == truth.shape
            assert not got.isnan().any()
            # A constant row divides its rounding errors by sqrt(eps).
            amplified = 2.0**-24 * (EPS_NORM**-0.5 if shape[-1] == 1 else 16)
            rounding = 4 * EPS[dtype] * float(truth.norm()) + 4 * amplified * truth.numel() ** 0.5
            assert error(got, truth) <= 2 * error(plain, truth) + rounding, shape


@by_name
def test_same_bits_twice(case: OpCase, device):
    inputs = case.make_inputs((3, 7, 65), torch.bfloat16, device)
    grads = [torch.randn_like(y) for y in as_tuple(case.op(*inputs))]
    first = values_and_grads(case.op, inputs, grads)
    second = values_and_grads(case.op, inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@by_name
def test_one_graph_with_gradients(case: OpCase, device):
    inputs = case.make_inputs((2, 3, 40), torch.float32, device)
    grads = [torch.randn_like(y) for y in as_tuple(case.op(*inputs))]
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        values_and_grads(compiled, inputs, grads),
        values_and_grads(case.op, inputs, grads),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@by_name
def test_second_derivatives(case: OpCase, device):
    """A loss on gradients, as forces need: create_graph=True through every op."""
    inputs = [x.detach() for x in case.make_inputs((2, 3, 40), torch.float32, device)]
    found = {}
    for function, dtype in ((case.op, torch.float32), (case.reference, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        total = torch.stack([y.sin().sum() for y in as_tuple(function(*leaves))]).sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        loss = torch.stack([g.square().sum() for g in grads]).sum()
        found[dtype] = torch.autograd.grad(loss, leaves)
    for got, want in zip(found[torch.float32], found[torch.float64], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@by_name
def test_non_contiguous_rows_and_no_rows(case: OpCase, device):
    inputs = case.make_inputs((2, 3, 40), torch.float32, device)
    spread = [torch.stack([x.detach(), -x.detach()], -1)[..., 0] for x in inputs]
    assert not spread[0].is_contiguous()
    grads = [torch.ones(()).to(device).expand_as(y) for y in as_tuple(case.op(*inputs))]
    for got, want in zip(
        values_and_grads(case.op, spread, grads),
        values_and_grads(case.op, inputs, grads),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    for shape in ((2, 0, 40), (0, 3, 40)):
        empty = case.make_inputs(shape, torch.float32, device)
        grads = [torch.zeros_like(y) for y in as_tuple(case.op(*empty))]
        values = values_and_grads(case.op, empty, grads)
        assert all(not v.any() for v in values)


@by_name
def test_the_cpu_reference_path_agrees(case: OpCase, device, request):
    from fastft_kernels.device import interpret_on_cpu

    inputs = [x.detach().cpu() for x in case.make_inputs((2, 3, 40), torch.float32, device)]
    grads = [torch.randn_like(y) for y in as_tuple(case.reference(*inputs))]
    doubles = [x.double() for x in inputs]
    truths = values_and_grads(case.reference, doubles, [g.double() for g in grads])
    interpret_on_cpu(False)
    for got, truth in zip(values_and_grads(case.op, inputs, grads), truths, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    empty = [x.detach().cpu() for x in case.make_inputs((0, 3, 40), torch.float32, device)]
    grads = [torch.zeros_like(y) for y in as_tuple(case.op(*empty))]
    assert all(not v.any() for v in values_and_grads(case.op, empty, grads))


@by_name
def test_selective_checkpointing_sees_the_op(case: OpCase, device):
    """A policy that keeps the op's outputs by name must not run it a second time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Names():
        case.op(*case.make_inputs((2, 3, 40), torch.float32, device))
    assert any(name.startswith("fastft::") for name in seen)
