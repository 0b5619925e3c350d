"""`report.html`: the report as one page that needs nothing but itself."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from string import Template

from fastft.profiling.memory_chart import memory_chart
from fastft.profiling.palette import KIND_COLOURS, PHASE_COLOURS, kind_label
from fastft.profiling.report import IDLE, CompileEvent, KernelTime, ProfileReport
from fastft.profiling.style import CSS

# Characters that a whole bar has room for. Parts too narrow for their name have none: the table
# below has all of them.
_BAR_CHARACTERS = 135

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$css</style>
</head>
<body>
$body
</body>
</html>
""")


def render_page(report: ProfileReport) -> str:
    """The page; text from the run and the trace is escaped."""
    sections = [
        _head(report),
        _advice(report),
        _steps(report),
        _kinds(report),
        _kernels(report),
        _waits(report),
        _compiled(report),
        _memory(report),
        _method(report),
    ]
    title = f"Profile of {report.run.title}"
    return _PAGE.substitute(title=_text(title), css=CSS, body="\n".join(filter(None, sections)))


def on_gpu(report: ProfileReport) -> bool:
    """Whether times are the GPU's: not without one, nor where the trace holds none of its work."""
    return report.phases[0].gpu_ms is not None


def step_numbers(report: ProfileReport) -> str:
    """The profiled steps as the log counts them, from 1."""
    first, count = report.run.first_step + 1, len(report.step_ms)
    return f"step {first}" if count == 1 else f"steps {first} to {first + count - 1}"


def tiles(report: ProfileReport) -> dict[str, tuple[str, str]]:
    """The summary: name -> (number with unit, what it means)."""
    arithmetic, steps = report.arithmetic, len(report.step_ms)
    without = "" if report.unprofiled_ms is None else ", without the profiler"
    found = {
        "step": (f"{report.true_step_ms:.2f} ms", f"mean time per step{without}"),
        "samples": (f"{report.run.samples / report.true_step_ms * 1e3:,.0f}", "samples per second"),
    }
    if on_gpu(report):
        found["busy"] = (f"{1 - report.idle_share:.1%}", "of the time the GPU works")
    rate = rate_text(arithmetic.tflops)
    if arithmetic.mfu is not None and arithmetic.peak_tflops is not None:
        of = f"MFU: {rate} of {arithmetic.peak_tflops:,.0f} in {report.run.precision}"
        found["mfu"] = (f"{arithmetic.mfu:.1%}", of)
    elif arithmetic.tflop:
        found["rate"] = (rate, "matrix products, convolutions, attention")
    if report.memory is not None:
        found["memory"] = (f"{report.memory.peak / 2**30:.2f} GiB", "peak of allocated memory")
    if on_gpu(report):
        waits = sum(wait.count for wait in report.waits) / steps
        found["waits"] = (f"{waits:.3g}", "waits of the host per step")
    return found


def rate_text(tflops: float) -> str:
    """1e12 operations per second in the fitting unit."""
    return f"{tflops:,.1f} TFLOP/s" if tflops >= 1 else f"{tflops * 1e3:,.1f} GFLOP/s"


def _head(report: ProfileReport) -> str:
    run = report.run
    facts = [
        run.device,
        run.precision,
        f"compile {run.compile}",
        f"{run.samples} samples per step",
        step_numbers(report),
    ]
    if run.accumulate > 1:
        facts.insert(3, f"{run.accumulate} micro-batches")
    shown = "".join(
        f'<div class="tile"><b>{_text(number)}</b><span>{_text(meaning)}</span></div>'
        for number, meaning in tiles(report).values()
    )
    return (
        f"<h1>Profile of {_text(run.title)}</h1>\n"
        f'<p class="dim">{_text(" · ".join(facts))}</p>\n<div class="tiles">{shown}</div>'
    )


def _advice(report: ProfileReport) -> str:
    if not report.advice:
        body = "<p>None of fastft's rules finds anything to improve in these steps.</p>"
    else:
        items = "".join(
            f"<li><b><code>{_text(advice.setting)}</code></b><br>{_text(advice.text)}</li>"
            for advice in report.advice
        )
        body = f'<ul class="advice">{items}</ul>'
    return f"<h2>Advice</h2>\n{body}"


def _steps(report: ProfileReport) -> str:
    gpu, phases = on_gpu(report), report.phases
    scale = max(report.mean_step_ms, sum(phase.host_ms for phase in phases))
    bars = [_row("host", {p.name: p.host_ms for p in phases}, scale, PHASE_COLOURS, str)]
    if gpu:
        times = {p.name: p.gpu_ms or 0.0 for p in phases}
        times[IDLE] = max(0.0, report.mean_step_ms - sum(times.values()))
        bars.append(_row("GPU", times, scale, PHASE_COLOURS | {IDLE: "#8a8a8a"}, str))
    columns = ["phase", "host ms", "share"]
    columns += ["GPU ms", "share", "GPU idle meanwhile, ms"] if gpu else []
    rows = []
    for phase in phases:
        row = [_named(phase.name, PHASE_COLOURS[phase.name]), _ms(phase.host_ms)]
        row.append(_share(phase.host_ms / report.mean_step_ms))
        if phase.gpu_ms is not None and phase.idle_ms is not None:
            row += [_ms(phase.gpu_ms), _share(phase.gpu_ms / report.mean_step_ms)]
            row.append(_ms(phase.idle_ms))
        rows.append(row)
    each = ", ".join(f"{ms:.2f}" for ms in report.step_ms)
    return (
        f"<h2>A step by phase, under the profiler</h2>\n{''.join(bars)}\n"
        f"{_table(columns, rows)}\n<p>{step_numbers(report).capitalize()}, in ms: {each}; mean"
        f" {report.mean_step_ms:.2f}. {_slowdown(report)}</p>"
    )


def _slowdown(report: ProfileReport) -> str:
    if report.unprofiled_ms is None:
        return "The same without the profiler was not measured; the host is then faster."
    return (
        f"Without the profiler, which slows the host down, a step took {report.unprofiled_ms:.2f}"
        " ms: everything below refers to that."
        if on_gpu(report)
        else f"Without the profiler a step took {report.unprofiled_ms:.2f} ms."
    )


def _kinds(report: ProfileReport) -> str:
    gpu = on_gpu(report)

    def label(name: str) -> str:
        return kind_label(name, on_gpu=gpu)

    shown = [kind for kind in report.kinds if kind.ms > 0]
    times = {kind.name: kind.ms for kind in shown}
    bar = _row("GPU" if gpu else "host", times, sum(times.values()), KIND_COLOURS, label)
    rows = [
        [_named(label(kind.name), KIND_COLOURS[kind.name]), _ms(kind.ms), _share(kind.share)]
        for kind in shown
    ]
    what = "GPU time of a step" if gpu else "A step"
    table = _table(["kind", "ms per step", "share of the step"], rows)
    return f"<h2>{what} by kind of work</h2>\n{bar}\n{table}"


def _kernels(report: ProfileReport) -> str:
    gpu = on_gpu(report)
    has_rates = any(k.tflops or k.gb_per_s for k in report.kernels)
    columns = ["kernel" if gpu else "operator", "kind", "calls", "total ms", "share", "mean µs"]
    rows = []
    for kernel in report.kernels:
        name, short = _text(kernel.name), _text(_short(kernel.name))
        row = [
            f'<td class="text long"><code title="{name}">{short}</code></td>',
            _text(kind_label(kernel.kind, on_gpu=gpu)),
            f"{kernel.calls:,}",
            _ms(kernel.total_ms),
            _share(kernel.share),
            f"{kernel.mean_us:,.1f}",
        ]
        rows.append([*row, *([_rate(kernel)] if has_rates else [])])
    columns += ["achieved"] if has_rates else []
    steps = len(report.step_ms)
    own = "" if gpu else ", without the operators that they call"
    over = f"Calls and times of {step_numbers(report)} together" if steps > 1 else "One step"
    return (
        f"<h2>The {len(rows)} {'kernels' if gpu else 'operators'} that take longest</h2>\n"
        f'<p class="dim">{over}{own}.</p>\n{_table(columns, rows, text=2)}'
    )


def _short(name: str) -> str:
    """A C++ name without what all of them have: return type, namespaces, argument list."""
    short = re.sub(r"^void |at::native::|\(anonymous namespace\)::|std::|c10::", "", name)
    # Not of template arguments that are functions themselves.
    return re.sub(r"^([\w:]+)(<.*>)?\(.*\)$", r"\1\2", short)


def _rate(kernel: KernelTime) -> str:
    if kernel.tflops is not None:
        return rate_text(kernel.tflops)
    if kernel.gb_per_s is None:
        return ""
    return f"{'≈ ' if kernel.gb_per_s_is_estimate else ''}{kernel.gb_per_s:,.1f} GB/s"


def _waits(report: ProfileReport) -> str:
    if not on_gpu(report):
        return ""
    if not report.waits:
        return "<h2>Waits of the host</h2>\n<p>None: nothing in the steps waited for the GPU.</p>"
    rows = [
        [_text(w.call), _text(w.operator or "none"), _text(w.phase), f"{w.count:,}", _ms(w.ms)]
        for w in report.waits[:20]
    ]
    columns = ["call", "under the operator", "phase", "count", "ms in all"]
    return f"<h2>Waits of the host</h2>\n{_table(columns, rows, text=3)}"


def _compiled(report: ProfileReport) -> str:
    compiled = report.compiled
    if report.run.compile == "off":
        return "<h2>torch.compile</h2>\n<p>Off (<code>step.compile</code>).</p>"
    lines = [
        f"<p>{compiled.graphs} graphs compiled since the start, {compiled.graphs_in_window} of them"
        f" in the profiled steps; Inductor's cache had {compiled.cache_hits} of"
        f" {compiled.cache_hits + compiled.cache_misses} asked for.</p>"
    ]
    if compiled.graph_breaks:
        lines.append(_events("graph break at", compiled.graph_breaks))
    else:
        lines.append("<p>No graph breaks.</p>")
    if compiled.recompiles:
        lines.append(
            '<p class="dim">Compiled anew. Each distinct block takes a graph of its own, in train'
            " and in eval mode, and so does each new size. Blocks of one class share a function, so"
            " the reason may be what another block's graph expects.</p>"
        )
        lines.append(_events("compiled anew: the function at", compiled.recompiles))
    return "<h2>torch.compile</h2>\n" + "\n".join(lines)


def _events(title: str, events: Sequence[CompileEvent]) -> str:
    """The most frequent first."""
    rows = [
        [_long(event.where or "unknown"), _long(event.reason), f"{event.count:,}"]
        for event in sorted(events, key=lambda event: -event.count)
    ]
    return _table([title, "reason", "count"], rows, text=2)


def _memory(report: ProfileReport) -> str:
    memory = report.memory
    if memory is None:
        return ""
    stays = [*memory.kept.items()]
    rest = memory.start - sum(memory.kept.values())
    if rest > 0:
        stays.append(("anything else between steps", rest))
    rows = [[name, f"{size / 2**20:,.1f}", f"{size / memory.peak:.1%}"] for name, size in stays]
    rows.append(
        ["gradients, from backward to update", f"{memory.gradients / 2**20:,.1f}",
         f"{memory.gradients / memory.peak:.1%}"]
    )  # fmt: skip
    rows.append(["peak", f"{memory.peak / 2**20:,.1f}", "100.0%"])
    columns = ["what", "MiB", "of the peak"]
    return (
        f"<h2>Memory over a step</h2>\n{memory_chart(memory)}\n{_table(columns, rows)}\n"
        f'<p class="dim">Step {report.run.first_step}, the one before the profiled ones. What'
        " rises above the shaded floor is activations, gradients and workspace. memory.pickle holds"
        " every allocation with its stack, for pytorch.org/memory_viz.</p>"
    )


def _method(report: ProfileReport) -> str:
    said = list(report.notes)
    if on_gpu(report):
        said.append(
            "A step begins when the host begins it or the GPU is done with the one before, and ends"
            " with the last work that it launched. GPU time counts where it was launched; where"
            " kernels overlap, time counts once."
        )
    said.append(
        "FLOPs are those of matrix products, convolutions and attention, from the shapes of their"
        " operators. Recomputed work counts, and causal attention counts in full."
    )
    if any(kernel.gb_per_s_is_estimate for kernel in report.kernels):
        said.append(
            "≈ GB/s is an estimate: bytes of the kernel's arguments, each counted once, over its"
            " time. A kernel that writes in place or reads twice moves more, one that reads a part"
            " moves less. No rate is shown where it would be above that of the GPU's memory, as"
            " where a cache has the arguments."
        )
    said.append("The profiler slows the host down by some microseconds per operator.")
    items = "".join(f"<li>{_text(note)}</li>" for note in said)
    return f'<h2>How this was measured</h2>\n<ul class="notes">{items}</ul>'


def _row(
    name: str,
    times: Mapping[str, float],
    scale: float,
    colours: Mapping[str, str],
    label: object,
) -> str:
    assert callable(label)
    parts = []
    for part, ms in times.items():
        if ms <= 0:
            continue
        share = ms / scale
        shown = f"{label(part)} {ms:.2f} ms"
        room = share * _BAR_CHARACTERS
        inside = next((text for text in (shown, f"{ms:.2f}") if len(text) < room), "")
        extra = ' class="idle"' if part == IDLE else ""
        parts.append(
            f'<i{extra} style="width:{share:.3%};background:{colours[part]}"'
            f' title="{_text(shown)}">{_text(inside)}</i>'
        )
    return (
        f'<div class="row"><span>{_text(name)}</span><div class="bar">{"".join(parts)}</div></div>'
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table of HTML cells, the first `text` columns to the left."""
    head = "".join(
        f'<th class="text">{c}</th>' if i < text else f"<th>{c}</th>" for i, c in enumerate(columns)
    )
    body = "".join(
        "<tr>" + "".join(_cell(cell, i < text) for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(cell: str, is_text: bool) -> str:
    if cell.startswith("<td"):
        return cell
    return f'<td class="text">{cell}</td>' if is_text else f"<td>{cell}</td>"


def _long(text: str) -> str:
    return f'<td class="text long">{_text(text)}</td>'


def _named(name: str, colour: str) -> str:
    extra = " idle" if name in (IDLE, "outside operators") else ""
    return f'<span class="swatch{extra}" style="background:{colour}"></span>{_text(name)}'


def _ms(ms: float) -> str:
    return f"{ms:,.2f}"


def _share(share: float) -> str:
    return f"{share:.1%}"


def _text(text: str) -> str:
    return html.escape(str(text))
