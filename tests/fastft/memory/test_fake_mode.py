"""FakeMode makes what torch's mode makes: shapes, strides, types, storages, and errors."""

from collections.abc import Callable
from typing import Any

import fastft_kernels
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional

from fastft.memory.fake_mode import FakeMode


def with_torch() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def views(x: Tensor) -> list[Tensor]:
    first, second = x.split([1, x.shape[0] - 1])
    return [first, second, x.t(), x[1:, ::2], x.view(-1, 2), x.unflatten(1, (2, 2)), x.detach()]


def alike(x: Tensor) -> list[Tensor]:
    """Equal but for one property, which results must not be mixed up by."""
    y = x.double()
    numbers = [x + 1, x.int() + 1, x.int() + 1.0, x.int() + True, x.sum(0), x.sum((0,))]
    shapes = [
        x + x,
        x.t() + x.t(),
        x[:, 1:] + 0,
        x[:, :3] + 0,
        torch.cat([x, x]),
        torch.stack([x, x]),
    ]
    turned = [x.clone(memory_format=torch.contiguous_format), x.t().clone(), x.to(torch.float64)]
    complex_ = torch.view_as_complex(x.view(4, 2, 2))
    return [*numbers, *shapes, *turned, y + 1, complex_.conj() + 1, complex_.conj().imag * 2]


def modules(x: Tensor) -> list[Tensor]:
    wide, narrow = x.repeat(1, 8), torch.ones(32)
    q = wide.view(1, 2, 4, 16)
    attended = functional.scaled_dot_product_attention(q, q, q)
    normed = fastft_kernels.layer_norm(wide, narrow, narrow)
    return [functional.linear(x, x.detach()), attended, functional.gelu(wide), normed]


def run(
    mode: Callable[[], FakeTensorMode], make: Callable[[Tensor], list[Tensor]]
) -> list[tuple[Any, ...]]:
    """Twice, of which the second is remembered; with the gradient of all."""
    found = []
    with mode():
        x = torch.empty(4, 4, requires_grad=True)
        base = x.untyped_storage()._cdata
        for _ in range(2):
            outputs = make(x)
            torch.stack([y.abs().sum() for y in outputs if y.requires_grad]).sum().backward()
            for y in (*outputs, x.grad):
                assert y is not None
                shared = y.untyped_storage()._cdata == base
                found.append((y.shape, y.stride(), y.storage_offset(), y.dtype, y.device, shared))
                found.append((y.requires_grad, y.is_leaf, y._is_view(), y.is_conj(), y.is_neg()))
                found.append((y.untyped_storage().nbytes(), type(y.grad_fn).__name__))
    return found


@pytest.mark.parametrize("make", [views, alike, modules])
def test_results_are_those_of_torch(make: Callable[[Tensor], list[Tensor]]) -> None:
    assert run(FakeMode, make) == run(with_torch, make)


@pytest.mark.parametrize("mode", [FakeMode, with_torch])
def test_constants_keep_their_values_in_views(mode: Callable[[], FakeTensorMode]) -> None:
    with mode():
        assert torch.tensor([4]).view(1, 1).t().item() == 4
        with pytest.raises(DataDependentOutputException):
            torch.ones(2)[0].item()
    real = torch.ones(3)
    with mode():
        assert (real.view(3, 1) + torch.empty(3)).shape == (3, 3)
