"""The page of a run on a GPU: escaping, and what a browser without a network shows."""

import dataclasses
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastft.profiling import (
    Advice,
    CompileEvent,
    CompileFacts,
    MemoryReport,
    ProfileReport,
    RunFacts,
    advise,
    measure,
    parse_trace,
    render_page,
)
from fastft.profiling.chart import draw_chart, summarise

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--window-size=1200,3000", "--enable-logging=stderr"),
    # Whatever the page might ask for goes nowhere.
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
BLOCKS = 24


def add_block(trace: Any, at: float, gpu: float, *, backward: bool) -> tuple[float, float]:
    """One transformer block; returns when host and GPU are done with it."""
    rows, width, factor = 64 * 197, 1024, 2 if backward else 1
    phase = "backward" if backward else "forward"
    work = [
        ("aten::native_layer_norm", "void at::native::vectorized_layer_norm_kernel<float>", 60),
        ("aten::addmm", "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", 130),
        ("aten::_scaled_dot_product_flash_attention", "pytorch_flash::flash_fwd_kernel<64>", 95),
        ("aten::mul", "void at::native::elementwise_kernel<128, 4, at::native::mul<T>>", 40),
        ("aten::copy_", "void at::native::unrolled_elementwise_kernel<direct_copy>", 25),
    ]
    for name, kernel, microseconds in work:
        dims: list[Sequence[int]] = [[rows, width]]
        if name == "aten::addmm":
            dims = [[4 * width], [rows, width], [width, 4 * width]]
        if name.endswith("attention"):
            dims = [[64, 16, 197, 64]] * 3
        operator = trace.operator(name, at, at + 18, dims)
        start = max(gpu, at + 12)
        gpu = start + microseconds * factor
        trace.kernel(f"{kernel} {phase}", at + 4, start, gpu, operator)
        at += 25
    return at, gpu


@pytest.fixture
def vision(trace: Any, gpu_run: RunFacts) -> ProfileReport:
    """A run like a vision transformer's, 24 blocks and three steps, and text to escape."""
    at, gpu = 0.0, 0.0
    for _ in range(3):
        began = at
        trace.mark("data", at, at + 900)
        trace.copy("Memcpy HtoD (Pinned -> Device)", at + 800, max(gpu, at + 850), gpu + 1600, 4e7)
        at, gpu = at + 900, max(gpu, at + 850) + 700
        for phase in ("forward", "backward"):
            phase_began = at
            for _ in range(BLOCKS):
                at, gpu = add_block(trace, at, gpu, backward=phase == "backward")
            if phase == "forward":
                loss = trace.operator("aten::item", at, at + 400)
                trace.call("cudaStreamSynchronize", at + 5, at + 390, loss)
                at += 400
            trace.mark(phase, phase_began, at)
        for phase, kernel, microseconds in (
            ("gradients", "_chunk_kernel", 300),
            ("update", "_adam_kernel", 2100),
        ):
            trace.mark(phase, at, at + 120)
            trace.kernel(kernel, at + 10, gpu, gpu + microseconds)
            at, gpu = at + 120, gpu + microseconds
        trace.mark("step", began, at)
        at += 50
    curve = tuple(
        (ms / 10, int(2**30 * (6 + 9 * math.sin(ms / 320 * math.pi)))) for ms in range(321)
    )
    memory = MemoryReport(
        curve=curve,
        peak=max(size for _, size in curve),
        start=curve[0][1],
        kept={"weights": int(1.2 * 2**30), "optimizer state": int(2.4 * 2**30)},
        gradients=int(1.2 * 2**30),
    )
    compiled = CompileFacts(
        graphs=2,
        graph_breaks=(CompileEvent("model.py:12", "call to print(<x> & 'y')", 3),),
        recompiles=(CompileEvent("blocks.py:40", "size of x changed: 64 != 32", 2),),
        cache_hits=1,
        cache_misses=1,
    )
    run = dataclasses.replace(gpu_run, title="vit <large> & co", compile="model")
    report = measure(parse_trace(trace.events), run, compiled, memory, unprofiled_ms=31.5)
    return report.with_advice(advise(report))


def test_text_is_escaped(vision: ProfileReport) -> None:
    page = render_page(vision.with_advice((Advice("a.b", "<b>1 > 0</b>"),)))
    assert "vit &lt;large&gt; &amp; co" in page
    assert "call to print(&lt;x&gt; &amp; &#x27;y&#x27;)" in page
    assert "&lt;b&gt;1 &gt; 0&lt;/b&gt;" in page
    assert "<large>" not in page


def test_every_part_is_on_the_page(vision: ProfileReport) -> None:
    page = render_page(vision)
    (wait,) = vision.waits
    shown = [
        f"{vision.arithmetic.mfu:.1%}",
        f"{wait.count}</td><td>{wait.ms:.2f}",
        f"{vision.memory and vision.memory.peak / 2**30:.2f} GiB",
        "31.50 ms",
        "model.py:12",
        "blocks.py:40",
        "size of x changed: 64 != 32",
        *(f"{kind.ms:,.2f}" for kind in vision.kinds if kind.ms),
    ]
    assert [text for text in shown if text not in page] == []


def test_no_advice_is_said(vision: ProfileReport) -> None:
    page = render_page(vision.with_advice(()))
    assert "None of fastft's rules finds anything" in page


def test_summary_and_chart_for_tensorboard(vision: ProfileReport) -> None:
    text = summarise(vision)
    assert "| 31.50 ms |" in text
    assert all(advice.text in text for advice in vision.advice)
    pixels = draw_chart(vision)
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == ("uint8", 3, 3)
    assert pixels.std() > 0


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; .ci/run installs it as root")
def test_a_browser_without_network_shows_it(vision: ProfileReport, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render_page(vision), encoding="utf-8")
    picture = tmp_path / "report.png"

    def chromium(*flags: str) -> subprocess.CompletedProcess[str]:
        profile = f"--user-data-dir={tmp_path / 'user'}"
        return subprocess.run(
            [str(CHROMIUM), *FLAGS, profile, *flags, file.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    shown = chromium("--dump-dom")
    assert "31.50 ms" in shown.stdout
    assert "vit &lt;large&gt; &amp; co" in shown.stdout
    assert shown.stdout.count("<tr>") > 40
    # Messages of the page itself: a refused resource, or an error of the parser.
    assert "CONSOLE" not in shown.stderr
    assert "ERR_" not in shown.stderr
    chromium(f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
