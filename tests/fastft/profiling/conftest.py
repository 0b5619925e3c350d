"""Traces made by hand: marks, operators, launches and GPU work, as torch's profiler writes them."""

from collections.abc import Sequence
from typing import Any

import pytest

from fastft.profiling import RunFacts


class TraceBuilder:
    """Collects Chrome-trace events; times are microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._number = 0

    def mark(self, name: str, start: float, end: float) -> None:
        self._add("user_annotation", f"fastft/{name}", start, end)

    def operator(
        self,
        name: str,
        start: float,
        end: float,
        dims: Sequence[Any] = (),
        values: Sequence[str] = (),
        thread: int = 1,
        types: Sequence[str] = (),
        strides: Sequence[Any] = (),
        **more: Any,
    ) -> int:
        """Returns its external id."""
        self._number += 1
        arguments = {
            "External id": self._number,
            "Input Dims": [list(shape) for shape in dims],
            "Input Strides": [list(steps) for steps in strides],
            "Input type": list(types),
            "Concrete Inputs": list(values),
            **more,
        }
        self._add("cpu_op", name, start, end, arguments, thread)
        return self._number

    def call(self, name: str, start: float, end: float, operator: int = -1) -> int:
        """Returns its correlation id."""
        self._number += 1
        arguments = {"correlation": self._number, "External id": operator}
        category = "cuda_driver" if name.startswith("cu") and name[2].isupper() else "cuda_runtime"
        self._add(category, name, start, end, arguments)
        return self._number

    def kernel(
        self, name: str, launched: float, start: float, end: float, operator: int = -1
    ) -> None:
        correlation = self.call("cudaLaunchKernel", launched, launched + 5, operator)
        self._work("kernel", name, start, end, correlation, operator)

    def copy(
        self, name: str, launched: float, start: float, end: float, size: int, operator: int = -1
    ) -> None:
        blocked = end if "Pageable" in name else launched + 5
        correlation = self.call("cudaMemcpyAsync", launched, blocked, operator)
        self._work("gpu_memcpy", name, start, end, correlation, operator, bytes=size)

    def _work(
        self,
        category: str,
        name: str,
        start: float,
        end: float,
        correlation: int,
        operator: int,
        **more: Any,
    ) -> None:
        arguments = {"correlation": correlation, "External id": operator, "stream": 7, **more}
        self._add(category, name, start, end, arguments, thread=7)

    def _add(
        self,
        category: str,
        name: str,
        start: float,
        end: float,
        arguments: dict[str, Any] | None = None,
        thread: int = 1,
    ) -> None:
        self.events.append(
            {
                **{"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread},
                **{"ts": start, "dur": end - start, "args": arguments or {}},
            }
        )


@pytest.fixture
def trace() -> TraceBuilder:
    return TraceBuilder()


@pytest.fixture
def gpu_run() -> RunFacts:
    return RunFacts(
        title="run",
        device="NVIDIA H100 80GB HBM3",
        is_gpu=True,
        precision="bf16",
        compile="off",
        layer_norm="auto",
        blocks=24,
        workers=2,
        samples=64,
        accumulate=1,
        first_step=10,
    )


@pytest.fixture
def two_steps(trace: TraceBuilder) -> TraceBuilder:
    """Two steps of 1100 and 400 µs, the second without phases; see test_measure for the sums."""
    trace.mark("step", 0, 1000)
    trace.mark("data", 0, 100)
    trace.copy("Memcpy HtoD (Pinned -> Device)", 50, 60, 80, size=40_000)
    trace.mark("forward", 100, 400)
    addmm = trace.operator("aten::addmm", 150, 200, [[64], [128, 32], [32, 64]])
    trace.kernel("sm90_xmma_gemm_bf16bf16_bf16f32", 160, 300, 500, addmm)
    add = trace.operator("aten::add", 205, 230, [[128, 64], [128, 64]])
    trace.kernel("void at::native::vectorized_elementwise_kernel<4>", 210, 500, 550, add)
    trace.mark("backward", 400, 700)
    # As autograd does, on a thread of its own.
    mm = trace.operator("aten::mm", 450, 500, [[32, 128], [128, 64]], thread=2)
    trace.kernel("ampere_sgemm_128x64_tn", 460, 600, 800, mm)
    trace.operator("aten::item", 540, 660, thread=2)
    scalar = trace.operator("aten::_local_scalar_dense", 545, 655, thread=2)
    trace.call("cudaStreamSynchronize", 550, 650, scalar)
    trace.mark("gradients", 700, 750)
    trace.kernel("_chunk_kernel", 710, 800, 820)
    trace.mark("update", 750, 900)
    # Ends after the host: the step is as long.
    trace.kernel("_adam_kernel", 760, 820, 1100)
    trace.mark("step", 1050, 1500)
    trace.kernel("mystery", 1060, 1200, 1300)
    # Outside of steps: profiling itself, and a hook's.
    trace.call("cudaDeviceSynchronize", 1600, 1700)
    trace.kernel("hook_kernel", 1610, 1620, 1640)
    return trace
