"""Where the time of one step goes, by kind of kernel."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from fastft.profiling.measure import measure
from fastft.profiling.report import CompileFacts, RunFacts
from fastft.profiling.trace import read_trace

KERNELS = 16


def break_down(run: Callable[[], object], precision: str) -> dict[str, Any]:
    """Milliseconds of one step per kind of kernel, idle time too, and its longest kernels.

    Kernels, `[name, calls, ms]`, are as long as without the profiler; idle time is not.
    """
    facts = RunFacts(
        title="benchmark",
        device=torch.cuda.get_device_name(),
        is_gpu=True,
        precision=precision,
        compile="blocks",
        layer_norm="torch",
        blocks=0,
        workers=0,
        samples=1,
        accumulate=1,
        first_step=0,
    )
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(
        activities=activities, schedule=schedule, acc_events=True
    ) as profiler:
        for _ in range(2):
            with record_function("fastft/step"):
                run()
                torch.cuda.synchronize()
            profiler.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        report = measure(read_trace(path), facts, CompileFacts())
    return {
        "kinds_ms": {kind.name: round(kind.ms, 2) for kind in report.kinds},
        "kernels": [
            [kernel.name[:120], kernel.calls, round(kernel.total_ms, 2)]
            for kernel in report.kernels[:KERNELS]
        ],
    }
