"""What only a GPU shows: wide rows, addresses past 2^31, Inductor, waits."""

import pytest
import torch
from fastft_kernels import FusedAdam, GradientNorm, layer_norm
from fastft_kernels.catalog import CATALOG, OpCase, as_tuple, values_and_grads
from torch import nn

pytestmark = pytest.mark.gpu
by_name = pytest.mark.parametrize("case", CATALOG, ids=lambda case: case.name)


@by_name
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(301, n, torch.bfloat16) for n in (512, 1024, 2048, 4096, 5000, 8192, 16384)]
    + [(301, n, torch.float32) for n in (3000, 8192, 16384)]
    # Enough rows for the schedule of large problems.
    + [(20_001, 513, torch.bfloat16), (40_001, 384, torch.float32)],
)
def test_wide_and_many_rows_against_float64(case: OpCase, rows, columns, dtype, device):
    inputs = case.make_inputs((2, rows, columns), dtype, device)
    grads = [torch.randn_like(y) for y in as_tuple(case.op(*inputs))]
    doubles = [x.detach().double() for x in inputs]
    truths = values_and_grads(case.reference, doubles, [g.double() for g in grads])
    eager = values_and_grads(case.reference, inputs, grads)
    fused = values_and_grads(case.op, inputs, grads)
    unit = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-22
    for got, plain, truth in zip(fused, eager, truths, strict=True):
        allowed = 2 * (plain - truth).norm() + unit * truth.norm()
        assert (got - truth).norm() <= allowed


@by_name
def test_inductor_keeps_the_op_in_one_graph(case: OpCase, device):
    inputs = case.make_inputs((2, 40, 512), torch.bfloat16, device)

    def block(*inputs):
        return torch.nn.functional.gelu(as_tuple(case.op(*inputs))[0]) * 2

    compiled = torch.compile(block, fullgraph=True)
    grads = [torch.randn_like(block(*inputs))]
    wanted = values_and_grads(block, inputs, grads)
    for got, want in zip(values_and_grads(compiled, inputs, grads), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@by_name
def test_early_starts_in_a_graph_change_no_bit(case: OpCase, device):
    """Kernels behind one another, each on what the one ahead of it has written."""
    inputs = case.make_inputs((2, 513, 512), torch.bfloat16, device)

    def chain() -> tuple[torch.Tensor, ...]:
        first, *others = inputs
        for _ in range(20):
            first = as_tuple(case.op(first, *others))[0]
        return first, *torch.autograd.grad(first.sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # A backward runs where the inputs were first used, which must be the stream of the graph.
    with torch.cuda.stream(side):
        wanted = chain()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            found = chain()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        graph.replay()
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_addresses_past_two_to_the_31(device):
    x = torch.randn(140_000, 16384, device=device, dtype=torch.bfloat16).requires_grad_()
    w = torch.randn(16384, device=device, requires_grad=True)
    y = layer_norm(x, w)
    torch.testing.assert_close(y[-3:], layer_norm(x[-3:].detach(), w), rtol=0, atol=0)
    (dx,) = torch.autograd.grad(y, x, x.detach())
    tail = x[-3:].detach().requires_grad_()
    (want,) = torch.autograd.grad(layer_norm(tail, w), tail, tail.detach())
    torch.testing.assert_close(dx[-3:], want, rtol=0, atol=0)


def test_a_tensor_of_more_than_two_to_the_31_elements(device):
    p = nn.Parameter(torch.zeros((1 << 31) + 4096, device=device, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.5)
    result = GradientNorm()([p.grad])
    torch.testing.assert_close(result.global_norm.item(), (0.25 * p.numel()) ** 0.5)
    FusedAdam([p], lr=0.125, weight_decay=0.0, state_layout="8bit").step()
    assert p.min().item() == p.max().item() == -0.125


def test_nothing_waits_for_the_gpu_and_nothing_recompiles(device):
    params = [nn.Parameter(torch.randn(300, 7, device=device)) for _ in range(20)]
    optimizer = FusedAdam([{"params": [p]} for p in params], lr=1e-3, monitor=True)
    norm = GradientNorm(range(20), max_norm=1.0)

    def step(scale: float) -> None:
        for p, group in zip(params, optimizer.param_groups, strict=True):
            p.grad = torch.randn_like(p)
            group["lr"] = 1e-3 * scale
        result = norm([p.grad for p in params])
        optimizer.step(grad_divisor=result.grad_divisor, skip=result.skip)

    for i in range(2):
        step(1.0 + i)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(5):
            step(1.0 / (i + 1))
            optimizer.statistics()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_each_step_takes_its_own_rates_however_far_the_host_is_ahead(device):
    ends = []
    for sleep in (0, 1 << 30):
        params = [nn.Parameter(torch.ones(100, device=device)) for _ in range(3)]
        optimizer = FusedAdam([{"params": [p]} for p in params], weight_decay=0.5)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        torch.cuda._sleep(sleep)
        # More steps than there are slots for rates.
        for i in range(100):
            for j, group in enumerate(optimizer.param_groups):
                group["lr"] = 1e-3 * (j + 1) / (i + 1)
            optimizer.step()
            if not sleep:
                torch.cuda.synchronize()
        ends.append(torch.stack([*params]))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_later_step_takes_other_dtypes_and_alignments(device):
    """The kernels are looked up at the first step alone."""
    plain, p = (nn.Parameter(torch.ones(1000, device=device)) for _ in range(2))
    peer, optimizer = torch.optim.AdamW([plain], lr=0.1), FusedAdam([p], lr=0.1)
    unaligned = torch.tensor([1.0, 2.0, 4.0], device=device)
    skip = torch.zeros(3, dtype=torch.bool, device=device)
    for divisor in (unaligned[0], unaligned[1], unaligned.double()[2]):
        p.grad = torch.randn_like(p)
        plain.grad = p.grad / divisor.float()
        peer.step()
        optimizer.step(grad_divisor=divisor, skip=skip[1])
        torch.testing.assert_close(p, plain, rtol=1e-5, atol=1e-6)
