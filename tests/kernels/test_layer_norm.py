import pytest
import torch
from fastft_kernels import (
    FusedLayerNorm,
    adaptive_layer_norm,
    layer_norm,
    residual_layer_norm,
    use_fused_layer_norm,
)
from fastft_kernels.catalog import values_and_grads
from torch import nn


def plain_norm(x, weight, bias):
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias)


def test_opcheck(device):
    x, r = (torch.randn(3, 20, device=device, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(20, device=device, requires_grad=True) for _ in range(2))
    ops = torch.ops.fastft
    for arguments in [(x, None, w, b), (x, r, w, None), (x, r, None, None)]:
        torch.library.opcheck(ops.layer_norm_forward, (*arguments, 1e-5, torch.bfloat16))
    scale, shift = (torch.randn(3, 20, device=device, requires_grad=True) for _ in range(2))
    for residual in (None, r):
        arguments = (x, scale, shift, residual, 1e-5, torch.float32)
        torch.library.opcheck(ops.adaptive_norm_forward, arguments)


def test_low_precision_under_autocast(device):
    x = torch.randn(4, 32, device=device, requires_grad=True)
    w = torch.randn(32, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer_norm(x, w)
        z, s = residual_layer_norm(x, x, w)
        a = adaptive_layer_norm(x, x[:, :32], x[:, :32])
    assert (y.dtype, z.dtype, s.dtype, a.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_mixed_residual_stream(device):
    x = torch.randn(4, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    r = torch.randn(4, 32, device=device, requires_grad=True)
    y, s = residual_layer_norm(x, r)
    (y.float().sum() + s.square().sum()).backward()
    assert s.dtype == torch.float32
    assert x.grad is not None
    assert r.grad is not None
    assert (x.grad.dtype, r.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(s, x + r)


def test_one_unused_output_and_frozen_parameters(device):
    x, r = (torch.randn(4, 33, device=device, requires_grad=True) for _ in range(2))
    w, b = torch.randn(33, device=device), torch.randn(33, device=device, requires_grad=True)
    y, s = residual_layer_norm(x, r, w, b)
    (only_s,) = torch.autograd.grad(s.sum(), x, retain_graph=True)
    torch.testing.assert_close(only_s, torch.ones_like(x))
    _, db = torch.autograd.grad(y.sum(), (r, b))
    torch.testing.assert_close(db, torch.full_like(b, 4.0))


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_module_has_the_state_dict_and_result_of_layer_norm(shape, device):
    torch.manual_seed(1)
    plain = nn.LayerNorm(shape).to(device)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    fused = FusedLayerNorm(shape).to(device)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, *shape, device=device)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)


def test_swap_says_what_it_swapped():
    class Odd(nn.LayerNorm):
        def forward(self, input):
            return input

    model = nn.ModuleDict(
        {"a": nn.LayerNorm(4), "odd": Odd(4), "wide": nn.LayerNorm(20000), "fc": nn.Linear(4, 4)}
    )
    weight = model["a"].weight
    report = use_fused_layer_norm(model)
    assert report.swapped == ("a",)
    assert [name for name, _ in report.kept] == ["odd", "wide"]
    assert "odd: kept, " in str(report)
    assert isinstance(model["a"], FusedLayerNorm)
    assert model["a"].weight is weight
    assert use_fused_layer_norm(model, alike=(Odd,)).swapped == ("odd",)


def test_refusals(device):
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match="last dimension"):
        layer_norm(torch.zeros(1, 16385, device=device))
    with pytest.raises(ValueError, match="float32, bfloat16"):
        layer_norm(x.double())
    for op in (layer_norm, lambda one: adaptive_layer_norm(one, one, one)):
        with pytest.raises(ValueError, match="last dimension must be 1 to 16384; got none"):
            op(x[0, 0])
    with pytest.raises(ValueError, match="one shape"):
        residual_layer_norm(x, x[:1])
    with pytest.raises(ValueError, match="scale and shift"):
        adaptive_layer_norm(x, x[0], x[0])
    for weight in (x[0, :4], x[0, :1], x[:1]):
        with pytest.raises(
            ValueError, match=r"^layer_norm: .* must have the shape .*, \(8,\); got"
        ):
            layer_norm(x, weight)
        with pytest.raises(ValueError, match=r"^residual_layer_norm: .* must have the shape"):
            residual_layer_norm(x, x, None, weight)


@pytest.mark.parametrize("affine", [True, False])
def test_the_module_refuses_rows_of_another_shape(affine, device):
    # The last has as many elements per row.
    for normalized, shape in ([8], (2, 4)), ([3, 8], (8,)), ([2, 6], (5, 3, 4)):
        norm = FusedLayerNorm(normalized, elementwise_affine=affine).to(device)
        with pytest.raises(ValueError, match=r"^FusedLayerNorm: the last dimensions must be"):
            norm(torch.randn(shape, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [63, 1500, 5000])
def test_weights_in_the_dtype_of_x(columns, dtype, device):
    """The catalog's are in float32."""
    x = torch.randn(5, columns, device=device, dtype=dtype)
    w, b = (torch.randn(columns, device=device, dtype=dtype) for _ in range(2))
    grads = [torch.randn_like(x)]
    truths = values_and_grads(plain_norm, [t.double() for t in (x, w, b)], grads)
    eager = values_and_grads(plain_norm, (x, w, b), grads)
    fused = values_and_grads(layer_norm, (x, w, b), grads)
    for got, plain, truth in zip(fused, eager, truths, strict=True):
        assert got.dtype == dtype
        allowed = 2 * (plain - truth).norm() + 2.0**-9 * truth.norm()
        assert (got - truth).norm() <= allowed


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [40, 700, 1500, 3000, 6000, 16384])
def test_every_schedule_agrees(columns, weights, device, monkeypatch):
    # The interpreter takes seconds for a long row in passes.
    rows = 37 if columns < 5000 else 3
    x = torch.randn(rows, columns, device=device).bfloat16()
    other = torch.randn(rows, columns + 8, device=device).bfloat16()[:, :columns]
    w, b = (torch.randn(columns, device=device, dtype=weights) for _ in range(2))
    small = layer_norm(x, w, b), *residual_layer_norm(x, other, w, b)
    # Any number of rows is many for a GPU without multiprocessors.
    monkeypatch.setattr("fastft_kernels.row_schedule.multiprocessors", lambda device: 0)
    for bandwidth in (3.4e12, 4.9e12):
        monkeypatch.setattr(
            "fastft_kernels.row_schedule.memory_bandwidth", lambda _, to=bandwidth: to
        )
        found = layer_norm(x, w, b), *residual_layer_norm(x, other, w, b)
        torch.testing.assert_close(found, small)


def test_what_the_op_does_not_know_goes_through_torch(device):
    norm, fused = nn.LayerNorm(20).to(device), nn.LayerNorm(20).to(device)
    use_fused_layer_norm(fused)
    assert type(fused) is FusedLayerNorm
    x, t = (torch.randn(3, 20, device=device) for _ in range(2))
    for got, want in zip(*(torch.func.jvp(m, (x,), (t,)) for m in (fused, norm)), strict=True):
        torch.testing.assert_close(got, want)
    plain = nn.LayerNorm(20, elementwise_affine=False).to(device)
    wide = plain(x.double())
    use_fused_layer_norm(plain)
    assert torch.equal(plain(x.double()), wide)
