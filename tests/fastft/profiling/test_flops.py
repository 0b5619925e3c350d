"""FLOPs from shapes in a real trace, against torch's own counter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastft_kernels import short_attention, window_attention
from fastft_kernels.weighted_attention import weighted_attention
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastft.profiling import parse_trace
from fastft.profiling.flops import operator_flops, owners, peak_flops


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


CASES: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: functional.linear(tensor(5, 7, 8), tensor(6, 8), tensor(6)),
    "batched": lambda: tensor(3, 4, 5) @ tensor(3, 5, 6),
    "baddbmm": lambda: torch.baddbmm(tensor(2, 3, 4), tensor(2, 3, 5), tensor(2, 5, 4)),
    "convolution": lambda: functional.conv2d(
        tensor(2, 4, 9, 8), tensor(6, 4, 3, 3), stride=2, padding=(1, 0)
    ),
    "dilated": lambda: functional.conv1d(tensor(2, 4, 20), tensor(3, 4, 3), dilation=2),
    "transposed": lambda: functional.conv_transpose2d(
        tensor(2, 4, 5, 6), tensor(4, 3, 2, 2), stride=2
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str, tmp_path: Path) -> None:
    assert profiled(CASES[name], tmp_path) == counted(CASES[name]) > 0


def test_groups_divide_all_three_products(tmp_path: Path) -> None:
    def whole() -> Tensor:
        return functional.conv2d(tensor(2, 4, 5, 5), tensor(6, 4, 3, 3))

    def grouped() -> Tensor:
        return functional.conv2d(tensor(2, 4, 5, 5), tensor(6, 2, 3, 3), groups=2)

    # torch's counter leaves the groups out of the weight's gradient.
    assert profiled(grouped, tmp_path) == counted(whole) / 2


def test_attention_is_its_products_and_the_scores_again(tmp_path: Path) -> None:
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        return tensor(2, 3, 8, 4), tensor(2, 3, 10, 4), tensor(2, 3, 10, 4)

    def fused() -> Tensor:
        return functional.scaled_dot_product_attention(*inputs())

    def spelt_out() -> Tensor:
        query, key, value = inputs()
        return (query @ key.mT).softmax(-1) @ value

    scores = 2 * (2 * 3) * 8 * 10 * 4
    assert profiled(fused, tmp_path) == counted(spelt_out) + scores


def slopes() -> Tensor:
    """As forces, whose loss takes the second derivative."""
    qkv = tensor(2, 5, 96)
    y = weighted_attention(qkv, tensor(2, 5), 2, 0.3)
    return torch.autograd.grad(y.sum(), qkv, create_graph=True)[0]


ATTENTION: dict[str, Callable[[], Tensor]] = {
    "windows": lambda: window_attention(
        tensor(1, 1, 2, 4, 96), 2, (1, 2, 3), (1, 2, 2), bias=tensor(2, 4, 4)
    ),
    # Its backward is two kernels.
    "large windows": lambda: window_attention(tensor(1, 1, 9, 8, 48), 1, (1, 9, 8), (1, 9, 8)),
    "shared queries": lambda: short_attention(tensor(1, 3, 32), tensor(2, 2, 64), 2),
    "own queries": lambda: short_attention(tensor(2, 2, 32), tensor(2, 3, 64), 2),
    "weighted, twice": slopes,
}


@pytest.mark.parametrize("kernel_path", ["interpreter"], indirect=True)
@pytest.mark.usefixtures("kernel_path")
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_kernels_say_what_they_compute(name: str, tmp_path: Path) -> None:
    """Once, also where the dispatcher calls the op, as in compiled graphs."""
    with FlopCounterMode(display=False) as counter:
        dispatched = profiled(ATTENTION[name], tmp_path)
    assert dispatched == counter.get_total_flops() > 0
    assert profiled(ATTENTION[name], tmp_path) == dispatched


def profiled(case: Callable[[], Tensor], folder: Path) -> int:
    """Operations of forward and backward, from the shapes in a trace."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profiler:
        case().sum().backward()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    operators = parse_trace(json.loads(path.read_text())["traceEvents"]).operators
    owner = owners(operators)
    return sum(operator_flops(op) for i, op in enumerate(operators) if owner[i] == i)


def counted(case: Callable[[], Tensor]) -> int:
    """The same by torch's counter, which sees the operators themselves."""
    with FlopCounterMode(display=False) as counter:
        case().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_peaks(device: str, precision: str, peak: float | None) -> None:
    assert peak_flops(device, precision) == peak
