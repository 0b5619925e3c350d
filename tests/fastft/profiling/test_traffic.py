"""Bytes of kernels from the tensors that a trace names, and the rates in the report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastft_kernels import FusedAdam, GradientNorm, layer_norm, residual_layer_norm
from fastft_kernels.device import RepeatedLaunch, launch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastft.profiling import CompileFacts, RunFacts, measure, parse_trace, read_trace
from fastft.profiling.page import render_page
from fastft.profiling.trace import Operator
from fastft.profiling.traffic import kernel_bytes, peak_bandwidth

FUSED = "triton_poi_fused_add_0"
BF16 = "c10::BFloat16"


def operator(name: str, *tensors: tuple[Any, ...]) -> Operator:
    """Of arguments (shape, strides, type)."""
    dims, strides, types = zip(*tensors, strict=True)
    return Operator(name, 1, 0.0, 1.0, 1, dims, strides, types, ())


def test_arguments_of_a_kernel_count_once() -> None:
    x, y = ((8, 4), (4, 1), BF16), ((8, 4), (4, 1), "float")
    assert kernel_bytes(FUSED, operator(FUSED, x, y, ((), (), "Scalar"))) == 64 + 128
    # One row, repeated; a column of a wider tensor.
    assert kernel_bytes(FUSED, operator(FUSED, ((8, 4), (0, 1), "float"))) == 16
    assert kernel_bytes(FUSED, operator(FUSED, ((8,), (100,), "float"))) == 32
    # The operator of another kernel says nothing of this one.
    assert kernel_bytes("triton_red_fused_1", operator(FUSED, x, y)) is None
    assert kernel_bytes(FUSED, operator(FUSED, ((2,), (1,), "a type to come"))) is None


@pytest.mark.parametrize(
    ("name", "tensors", "expected"),
    [
        ("aten::copy_", (((8, 4), (4, 1), BF16), ((8, 4), (4, 1), "float")), 64 + 128),
        ("aten::mul", (((8, 4), (4, 1), BF16), ((4,), (1,), BF16)), 64 + 8 + 64),
        ("aten::mul", (((8, 4), (4, 1), BF16), ((), (), "double")), 64 + 8 + 64),
        ("aten::gelu_backward", (((8,), (1,), BF16), ((8,), (1,), BF16)), 3 * 16),
        ("aten::index", (((8,), (1,), BF16),), None),
    ],
)
def test_eager_operators(name: str, tensors: tuple[Any, ...], expected: int | None) -> None:
    assert kernel_bytes("void at::native::elementwise_kernel", operator(name, *tensors)) == expected


def test_bandwidths() -> None:
    assert peak_bandwidth("NVIDIA A100-SXM4-40GB") == 1555e9
    assert peak_bandwidth("NVIDIA A100-SXM4-80GB") == 2039e9
    assert peak_bandwidth("NVIDIA H100 80GB HBM3") == 3350e9
    assert peak_bandwidth("NVIDIA H200") == 4800e9
    assert peak_bandwidth("NVIDIA Rubin") is None


def test_rates_in_the_report(trace: Any, gpu_run: RunFacts) -> None:
    trace.mark("step", 0, 1000)

    def run(kernel: str, at: int, name: str = "", us: float = 10, **more: Any) -> int:
        one = {"dims": [[1000, 1000]], "strides": [[1000, 1]], "types": [BF16]} | more
        found = trace.operator(name or kernel, at, at + 8, **one)
        trace.kernel(kernel, at + 1, at + 2, at + 2 + us, found)
        return found

    # 2 MB in 10 us are 200 GB/s.
    run(FUSED, 0)
    run(FUSED, 20, us=30)
    run("triton_poi_fused_cached", 60, us=0.5)
    run("_adam_kernel", 80, bytes=28_000_000, dims=[], types=[], strides=[])
    run("relu_kernel", 100, "aten::relu")
    two = run("gamma_kernel", 120, "aten::relu")
    trace.kernel("beta_kernel", 122, 140, 150, two)
    trace.copy("Memcpy HtoD (Pinned -> Device)", 160, 170, 180, size=40_000)
    report = measure(parse_trace(trace.events), gpu_run, CompileFacts())
    rates = {kernel.name: kernel.gb_per_s for kernel in report.kernels}
    assert rates == {
        FUSED: pytest.approx(100),
        # 4000 GB/s, which the memory of an H100 does not have.
        "triton_poi_fused_cached": None,
        "_adam_kernel": pytest.approx(2800),
        "relu_kernel": pytest.approx(400),
        "gamma_kernel": None,
        "beta_kernel": None,
        "Memcpy HtoD (Pinned -> Device)": pytest.approx(4),
    }
    page = render_page(report)
    assert "≈ 100.0 GB/s" in page
    assert "<td>4.0 GB/s" in page
    assert "≈ GB/s is an estimate" in page


class Kernel:
    """In the place of a Triton kernel, and of what it is compiled to."""

    __name__ = "_some_kernel"

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., "Kernel"]:
        def call(*arguments: object, **options: object) -> "Kernel":
            self.calls.append((*arguments, *options.values()))
            return self

        return call


def test_launches_are_operators_while_a_profiler_runs(tmp_path: Path) -> None:
    kernel, cpu = Kernel(), torch.device("cpu")
    x, table = torch.zeros(4, 8), torch.zeros(3, dtype=torch.int64)
    launch(kernel, (1,), cpu, x, 5)

    def case() -> None:
        # The same tensor twice, as the norms pass x where there is no residual.
        launch(kernel, (1,), cpu, x, x, x[0], None, 5, BLOCK=16)
        launch(kernel, (1,), cpu, x, table)
        launch(kernel, (1,), cpu, x, table, moved_bytes=1000)
        RepeatedLaunch(kernel, 1, cpu)(x)
        repeated = RepeatedLaunch(kernel, 1, cpu, moved_bytes=2000, BLOCK=16)
        repeated(x, table)
        repeated(table, x)

    found = recorded(case, tmp_path, kernel.__name__)
    assert found == [4 * 32 + 4 * 8, 1000, 4 * 32, 2000, 2000]
    assert len(kernel.calls) == 7
    # Compiled once; from then on constants follow the other arguments, and warps are known.
    assert kernel.calls[-2:] == [(x, table, 16, 4), (table, x, 16)]


@pytest.mark.parametrize("kernel_path", ["interpreter"], indirect=True)
@pytest.mark.usefixtures("kernel_path")
def test_norms_move_what_their_documents_say(tmp_path: Path) -> None:
    """4 and 6 bytes per element in bf16, 8 with a residual; and what is kept per row."""
    x, r = (torch.randn(16, 64).bfloat16().requires_grad_() for _ in range(2))
    elements, rows = 16 * 64, 8 * 16
    assert recorded(lambda: layer_norm(x), tmp_path, "_forward_kernel") == [4 * elements + rows]
    found = recorded(lambda: residual_layer_norm(x, r), tmp_path, "_forward_kernel")
    assert found == [8 * elements + rows]
    y = layer_norm(x)
    found = recorded(y.sum().backward, tmp_path, "_backward_kernel")
    assert found == [6 * elements + rows]


@pytest.mark.parametrize("kernel_path", ["interpreter"], indirect=True)
@pytest.mark.usefixtures("kernel_path")
@pytest.mark.parametrize(("layout", "each"), [("fp32", 28), ("bf16", 20)])
def test_adam_and_the_norm_say_what_they_move(layout: Any, each: int, tmp_path: Path) -> None:
    """Of a parameter without a gradient nothing."""
    params = [nn.Parameter(torch.randn(n)) for n in (100, 30, 7)]
    optimizer, norm = FusedAdam(params, state_layout=layout), GradientNorm()
    for p in params[:2]:
        p.grad = torch.randn_like(p)
    grads = [p.grad for p in params]
    assert recorded(lambda: norm(grads), tmp_path, "_chunk_kernel") == [4 * 130]
    assert recorded(optimizer.step, tmp_path, "_adam_kernel") == [each * 130]


def recorded(case: Callable[[], object], folder: Path, kernel: str) -> list[int | None]:
    """The bytes of each launch of the kernel in a real trace."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
        case()
    path = folder / "trace.json"
    seen.export_chrome_trace(str(path))
    operators = read_trace(path).operators
    return [kernel_bytes(kernel, one) for one in operators if one.name == kernel]
