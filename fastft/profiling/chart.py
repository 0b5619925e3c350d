"""The main charts as one picture, and the numbers as text, for TensorBoard."""

import numpy as np

from fastft.profiling.page import on_gpu, step_numbers, tiles
from fastft.profiling.palette import KIND_COLOURS, PHASE_COLOURS, kind_label
from fastft.profiling.report import IDLE, ProfileReport


def draw_chart(report: ProfileReport) -> np.ndarray:
    """Phases and kinds of work as stacked bars, uint8 [H, W, 3]."""
    # Not pyplot, which keeps a global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gpu = on_gpu(report)
    host = {p.name: (p.host_ms, PHASE_COLOURS[p.name]) for p in report.phases}
    bars = {"host by phase, under the profiler": host}
    if gpu:
        times = {p.name: (p.gpu_ms or 0.0, PHASE_COLOURS[p.name]) for p in report.phases}
        idle_ms = max(0.0, report.mean_step_ms - sum(ms for ms, _ in times.values()))
        bars["GPU by phase, under the profiler"] = {**times, "idle": (idle_ms, KIND_COLOURS[IDLE])}
    kinds = {kind_label(k.name, on_gpu=gpu): (k.ms, KIND_COLOURS[k.name]) for k in report.kinds}
    bars["GPU by kind" if gpu else "host by kind"] = kinds
    figure = Figure(figsize=(11, 1.0 + 1.5 * len(bars)), dpi=100, layout="constrained")
    for index, (name, parts) in enumerate(bars.items()):
        axes = figure.add_subplot(len(bars), 1, index + 1)
        left = 0.0
        for label, (ms, colour) in parts.items():
            if ms > 0:
                axes.barh(0, ms, left=left, color=colour, label=f"{label} {ms:.2f}")
                left += ms
        axes.set_xlim(0, left)
        axes.set_yticks([])
        axes.set_title(f"{name}, ms per step", loc="left", fontsize=10)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=6, fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def summarise(report: ProfileReport) -> str:
    """Summary and advice as markdown."""
    lines = [f"Profile of {step_numbers(report)}; the whole report: `profile/report.html`", ""]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {meaning} | {number} |" for number, meaning in tiles(report).values()]
    lines += ["", "| phase, under the profiler | host ms | GPU ms |", "| --- | ---: | ---: |"]
    for phase in report.phases:
        gpu = "" if phase.gpu_ms is None else f"{phase.gpu_ms:.2f}"
        lines.append(f"| {phase.name} | {phase.host_ms:.2f} | {gpu} |")
    lines += ["", *(f"- `{advice.setting}`: {advice.text}" for advice in report.advice)]
    return "\n".join(lines) + "\n"
