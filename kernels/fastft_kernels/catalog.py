"""Every norm of the library: what tests parametrize over and benchmarks walk.

A norm that is not here does not exist; one that is has a reference, tests and a benchmark. What is
called with more than tensors, as attention in windows, has cases of its own in both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft_kernels.adaptive_norm import adaptive_layer_norm
from fastft_kernels.adaptive_norm import reference as adaptive_reference
from fastft_kernels.layer_norm import layer_norm, residual_layer_norm
from fastft_kernels.layer_norm import reference as norm_reference

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class OpCase:
    """One op beside its plain-torch reference.

    Attributes:
        op: called with the tensors of `make_inputs`; returns a tensor or a tuple of tensors.
        reference: the same function in plain torch, in whatever dtype it is given.
        make_inputs: (shape, dtype, device) -> inputs; those that require grad are differentiated.
        shapes: `[B, L, N]`, small and odd.
        forward_tensors: tensors of x's size that forward moves, each once; backward_tensors alike.
    """

    name: str
    op: Callable[..., Tensor | Tensors]
    reference: Callable[..., Tensor | Tensors]
    make_inputs: Callable[[tuple[int, ...], torch.dtype, torch.device], Tensors]
    forward_tensors: int
    backward_tensors: int
    shapes: tuple[tuple[int, ...], ...] = (
        (2, 3, 1),
        (1, 5, 63),
        (2, 4, 513),
        (1, 2, 3000),
        (1, 3, 5000),
    )


def as_tuple(outputs: Tensor | Tensors) -> Tensors:
    """One output or several, as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def values_and_grads(
    function: Callable[..., Tensor | Tensors], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs of the function, then the gradients of all inputs for the given output gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = as_tuple(function(*inputs))
    grads = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)]
    found = torch.autograd.grad(outputs, inputs, grads)
    return [value.detach() for value in (*outputs, *found)]


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def _affine(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:
    row = shape[-1:]
    weight, bias = (_random(row, torch.float32, device) for _ in range(2))
    return _random(shape, dtype, device), weight, bias


def _affine_residual(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:
    x, weight, bias = _affine(shape, dtype, device)
    return x, _random(shape, dtype, device), weight, bias


def _adaptive(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:
    per_sample = (shape[0], shape[-1])
    return _random(shape, dtype, device), *(_random(per_sample, dtype, device) for _ in range(2))


def _adaptive_residual(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:
    return *_adaptive(shape, dtype, device), _random(shape, dtype, device)


CATALOG = (
    OpCase(
        "layer_norm",
        layer_norm,
        lambda x, w, b: norm_reference(x, w.to(x.dtype), b.to(x.dtype))[0],
        _affine,
        forward_tensors=2,
        backward_tensors=3,
    ),
    OpCase(
        "layer_norm_plain",
        layer_norm,
        lambda x: norm_reference(x)[0],
        lambda shape, dtype, device: (_random(shape, dtype, device),),
        forward_tensors=2,
        backward_tensors=3,
    ),
    OpCase(
        "residual_layer_norm",
        residual_layer_norm,
        lambda x, r, w, b: norm_reference(x, w.to(x.dtype), b.to(x.dtype), residual=r),
        _affine_residual,
        forward_tensors=4,
        backward_tensors=4,
    ),
    OpCase(
        "adaptive_layer_norm",
        adaptive_layer_norm,
        adaptive_reference,
        _adaptive,
        forward_tensors=2,
        backward_tensors=3,
    ),
    OpCase(
        "adaptive_layer_norm_residual",
        adaptive_layer_norm,
        adaptive_reference,
        _adaptive_residual,
        forward_tensors=3,
        backward_tensors=3,
    ),
)
