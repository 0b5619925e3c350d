"""Numbers of the report against sums by hand."""

import dataclasses
from typing import Any

import pytest

from fastft.profiling import CompileFacts, ProfileReport, RunFacts, measure, parse_trace


@pytest.fixture
def report(two_steps: Any, gpu_run: RunFacts) -> ProfileReport:
    return measure(parse_trace(two_steps.events), gpu_run, CompileFacts())


def test_a_step_ends_with_the_last_work_that_it_launched(report: ProfileReport) -> None:
    assert report.step_ms == (1.1, 0.4)
    assert report.mean_step_ms == pytest.approx(0.75)


def test_phases(report: ProfileReport) -> None:
    found = {phase.name: (phase.host_ms, phase.gpu_ms, phase.idle_ms) for phase in report.phases}
    # Per step, of two. GPU idle: 0-60, 80-300, 550-600, 1100-1200 and 1300-1500.
    expected = {
        "data": (0.050, 0.010, 0.040),
        "forward": (0.150, 0.125, 0.100),
        "backward": (0.150, 0.100, 0.025),
        "gradients": (0.025, 0.010, 0.0),
        "update": (0.075, 0.140, 0.0),
        "other": (0.275, 0.050, 0.150),
    }
    assert found.keys() == expected.keys()
    for name, times in expected.items():
        assert found[name] == pytest.approx(times), name


def test_kinds_and_idle_are_the_whole_step(report: ProfileReport) -> None:
    ms = {kind.name: kind.ms for kind in report.kinds if kind.ms}
    expected = {
        "matmul": 0.2,
        "elementwise": 0.025,
        "optimizer": 0.15,
        "copies": 0.01,
        "other": 0.05,
        "idle": 0.315,
    }
    assert ms == pytest.approx(expected)
    assert sum(kind.share for kind in report.kinds) == pytest.approx(1)
    assert report.idle_share == pytest.approx(630 / 1500)


def test_shares_and_rates_are_of_the_step_without_the_profiler(
    two_steps: Any, gpu_run: RunFacts
) -> None:
    events = parse_trace(two_steps.events)
    report = measure(events, gpu_run, CompileFacts(), unprofiled_ms=0.5)
    assert (report.true_step_ms, report.mean_step_ms) == (0.5, pytest.approx(0.75))
    share = {kind.name: kind.share for kind in report.kinds if kind.share}
    # The kernels take as long as under the profiler; the host, and so idle time, do not.
    assert share["matmul"] == pytest.approx(0.2 / 0.5)
    assert report.idle_share == pytest.approx((0.5 - 0.435) / 0.5)
    assert report.kernels[0].share == pytest.approx(280 / 1000)
    assert report.arithmetic.tflops == pytest.approx(524_288 / 0.5e-3 / 1e12)
    # A step that took less than its kernels is all work.
    shorter = measure(events, gpu_run, CompileFacts(), unprofiled_ms=0.4)
    assert shorter.idle_share == 0
    assert sum(kind.share for kind in shorter.kinds) == pytest.approx(1)


def test_kernels(report: ProfileReport) -> None:
    kernels = {kernel.name: kernel for kernel in report.kernels}
    assert report.kernels[0].name == "_adam_kernel"
    assert "hook_kernel" not in kernels
    gemm = kernels["sm90_xmma_gemm_bf16bf16_bf16f32"]
    assert (gemm.calls, gemm.kind) == (1, "matmul")
    assert gemm.total_ms == pytest.approx(0.2)
    assert gemm.mean_us == pytest.approx(200)
    assert gemm.share == pytest.approx(200 / 1500)
    # 2 * 128 * 32 * 64 operations in 200 us.
    assert gemm.tflops == pytest.approx(524_288 / 200e-6 / 1e12)
    copy = kernels["Memcpy HtoD (Pinned -> Device)"]
    assert copy.gb_per_s == pytest.approx(2.0)
    assert copy.tflops is None


def test_arithmetic(report: ProfileReport) -> None:
    # One product of 524288 operations in forward, one in backward, over two steps of 0.75 ms.
    assert report.arithmetic.tflop == pytest.approx(524_288e-12)
    assert report.arithmetic.tflops == pytest.approx(524_288 / 0.75e-3 / 1e12)
    assert report.arithmetic.peak_tflops == 989
    assert report.arithmetic.mfu == pytest.approx(524_288 / 0.75e-3 / 989e12)
    assert report.fp32_matmul_share == pytest.approx(200 / 1500)


def test_no_mfu_on_an_unknown_device(two_steps: Any, gpu_run: RunFacts) -> None:
    run = dataclasses.replace(gpu_run, device="NVIDIA Rubin")
    report = measure(parse_trace(two_steps.events), run, CompileFacts())
    assert report.arithmetic.mfu is None
    assert any("'NVIDIA Rubin' is not in" in note for note in report.notes)


def test_waits_count_inside_steps_only(report: ProfileReport) -> None:
    (wait,) = report.waits
    assert (wait.call, wait.operator) == ("cudaStreamSynchronize", "aten::item")
    assert (wait.phase, wait.count) == ("backward", 1)
    assert wait.ms == pytest.approx(0.1)


def test_a_copy_to_pageable_memory_is_a_wait(trace: Any, gpu_run: RunFacts) -> None:
    trace.mark("step", 0, 100)
    trace.mark("forward", 0, 100)
    to = trace.operator("aten::to", 5, 60)
    trace.copy("Memcpy DtoH (Device -> Pageable)", 10, 20, 50, size=8, operator=to)
    trace.copy("Memcpy DtoH (Device -> Pinned)", 70, 75, 80, size=8)
    (wait,) = measure(parse_trace(trace.events), gpu_run, CompileFacts()).waits
    assert (wait.call, wait.operator) == ("cudaMemcpyAsync, to the host", "aten::to")
    assert wait.ms == pytest.approx(0.04)


def test_time_in_which_kernels_overlap_counts_once(trace: Any, gpu_run: RunFacts) -> None:
    trace.mark("step", 0, 100)
    trace.kernel("ncclDevKernel_AllReduce", 1, 10, 60)
    trace.kernel("sm90_gemm", 2, 40, 90)
    report = measure(parse_trace(trace.events), gpu_run, CompileFacts())
    ms = {kind.name: kind.ms for kind in report.kinds if kind.ms}
    assert ms == pytest.approx({"communication": 0.05, "matmul": 0.03, "idle": 0.02})
    # The kernel itself took as long as it took.
    assert [kernel.total_ms for kernel in report.kernels] == pytest.approx([0.05, 0.05])


def test_a_convolution_computed_by_products_counts_once(trace: Any, gpu_run: RunFacts) -> None:
    trace.mark("step", 0, 100)
    values = ["", "", "", "[1, 1]", "[0, 0]", "[1, 1]", "False", "[0, 0]", "1"]
    trace.operator("aten::convolution", 10, 50, [[1, 3, 8, 8], [4, 3, 1, 1]], values)
    inner = trace.operator("aten::mm", 20, 40, [[64, 3], [3, 4]])
    trace.kernel("splitKreduce_kernel", 21, 30, 35, inner)
    trace.kernel("sgemm", 22, 40, 80, inner)
    report = measure(parse_trace(trace.events), gpu_run, CompileFacts())
    assert report.arithmetic.tflop * 1e12 == pytest.approx(2 * 64 * 3 * 4)
    rates = {kernel.name: kernel.tflops for kernel in report.kernels}
    assert rates["splitKreduce_kernel"] is None
    assert rates["sgemm"] == pytest.approx(1536 / 40e-6 / 1e12)


def test_launches_that_say_what_they_compute_count_once(trace: Any, gpu_run: RunFacts) -> None:
    trace.mark("step", 0, 100)
    trace.operator("fastft::window_attention_backward", 10, 50, [[1, 1, 9, 8, 48]])
    queries = trace.operator("queries_backward", 15, 25, [[1, 1, 9, 8, 48]], flops=3_000_000)
    trace.kernel("queries_backward", 16, 30, 40, queries)
    keys = trace.operator("keys_backward", 30, 40, [[1, 1, 9, 8, 48]], flops=4_000_000)
    trace.kernel("keys_backward", 31, 40, 60, keys)
    report = measure(parse_trace(trace.events), gpu_run, CompileFacts())
    assert report.arithmetic.tflop * 1e12 == pytest.approx(7_000_000)
    rates = {kernel.name: kernel.tflops for kernel in report.kernels}
    assert rates == {
        "queries_backward": pytest.approx(3e6 / 10e-6 / 1e12),
        "keys_backward": pytest.approx(4e6 / 20e-6 / 1e12),
    }


def test_without_a_gpu_operators_are_the_work(trace: Any, gpu_run: RunFacts) -> None:
    trace.mark("step", 0, 100)
    trace.mark("forward", 0, 50)
    trace.operator("aten::linear", 10, 40)
    trace.operator("aten::addmm", 15, 35, [[4], [2, 3], [3, 4]])
    # Longer than the rest of the product, of which it computes nothing.
    trace.operator("aten::copy_", 16, 32)
    trace.mark("update", 50, 100)
    trace.operator("aten::add_", 60, 80)
    run = dataclasses.replace(gpu_run, device="CPU", is_gpu=False, precision="fp32")
    report = measure(parse_trace(trace.events), run, CompileFacts())
    own = {kernel.name: (kernel.calls, kernel.total_ms) for kernel in report.kernels}
    assert own["aten::addmm"] == (1, pytest.approx(0.004))
    rates = {kernel.name: kernel.tflops for kernel in report.kernels}
    assert rates["aten::copy_"] is None
    assert rates["aten::addmm"] is not None
    # Before and after the product that it calls.
    assert own["aten::linear"] == (1, pytest.approx(0.01))
    kinds = {kind.name: kind.ms for kind in report.kinds if kind.ms}
    assert kinds["matmul"] == pytest.approx(0.004)
    assert kinds["optimizer"] == pytest.approx(0.02)
    assert report.idle_share == pytest.approx(0.5)
    assert report.phases[0].gpu_ms is None
    assert report.arithmetic.mfu is None


def test_a_gpu_run_whose_trace_has_no_gpu_work_says_so(trace: Any, gpu_run: RunFacts) -> None:
    trace.mark("step", 0, 100)
    report = measure(parse_trace(trace.events), gpu_run, CompileFacts())
    assert report.phases[0].gpu_ms is None
    assert any("holds no GPU work" in note for note in report.notes)


def test_a_replayed_graph_is_a_phase_without_arithmetic(trace: Any, gpu_run: RunFacts) -> None:
    trace.mark("step", 0, 1000)
    trace.mark("graph", 100, 200)
    # One launch of several kernels; copies of the batch go before it.
    trace.kernel("sm90_xmma_gemm_bf16bf16_bf16f32", 150, 160, 500)
    trace.kernel("void at::native::vectorized_elementwise_kernel<4>", 150, 500, 550)
    trace.mark("update", 300, 400)
    trace.kernel("_adam_kernel", 310, 550, 800)
    report = measure(parse_trace(trace.events), gpu_run, CompileFacts())
    phases = {phase.name: (phase.host_ms, phase.gpu_ms) for phase in report.phases}
    assert phases["graph"] == pytest.approx((0.1, 0.39))
    assert phases["update"] == pytest.approx((0.1, 0.25))
    kinds = {kind.name: kind.ms for kind in report.kinds if kind.ms}
    assert kinds == pytest.approx(
        {"matmul": 0.34, "elementwise": 0.05, "optimizer": 0.25, "idle": 0.36}
    )
    assert (report.arithmetic.tflop, report.arithmetic.mfu) == (0, None)
    assert "replayed from a CUDA graph" in report.notes[0]
