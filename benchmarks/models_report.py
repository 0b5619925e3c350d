"""Tables and a picture of Aurora's and PET's records, for `benchmarks.report`."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.table import table

mpl.use("Agg")
import matplotlib.pyplot as plt

Record = dict[str, Any]
UPSTREAM = "upstream's recipe"
KINDS = ("matmul", "attention", "convolution", "norm", "elementwise", "copies", "optimizer")
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C7", "C8")


def aurora_tables(records: list[Record]) -> list[str]:
    """Time, memory and what the time is spent on; what did not fit stays in the records."""
    upstream = next(r["step_ms"] for r in records if r["runner"] == UPSTREAM)
    rows = [
        [
            r["runner"],
            f"{r['step_ms']:.0f}",
            f"{upstream / r['step_ms']:.2f}",
            f"{r['peak_gib']:.1f}",
            f"{r['reserved_gib']:.1f}",
            *(f"{value:.0f}" for value in _kinds(r)),
        ]
        for r in records
        if "step_ms" in r
    ]
    head = ["runner", "ms per step", "times faster", "peak GiB", "reserved GiB", *KINDS, "other"]
    return ["", *table(head, rows)]


def _kinds(record: Record) -> list[float]:
    """Milliseconds by kind; what no kernel of these kinds takes is other, idle time among it."""
    found = [record["kinds_ms"][kind] for kind in KINDS]
    return [*found, max(0.0, record["step_ms"] - sum(found))]


def plot_aurora(records: list[Record], path: Path) -> Path:
    """A bar for each runner, beside the records; the file."""
    shown = sorted((r for r in records if "step_ms" in r), key=lambda r: r["step_ms"])
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.5 * len(shown)))
    for place, r in enumerate(shown):
        left = 0.0
        for kind, colour, ms in zip((*KINDS, "other"), COLOURS, _kinds(r), strict=True):
            axis.barh(place, ms, left=left, color=colour, label=None if place else kind)
            left += ms
        axis.annotate(f" {r['step_ms']:.0f}", (left, place), va="center")
    axis.set_yticks(range(len(shown)), [r["runner"] for r in shown])
    axis.set(xlabel="milliseconds of a step", xlim=(0, 1.08 * shown[-1]["step_ms"]))
    axis.legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target


def parity_tables(records: list[Record]) -> list[str]:
    """How far gradients are from float32, and how far losses from upstream's."""
    rows = [
        [
            r["runner"],
            *(f"{100 * r[share]:.2f} %" for share in ("p50%", "p90%", "p100%")),
            f"{r['losses'][0]:.4f}",
            f"{r['losses'][-1]:.4f}",
            f"{r['apart']:.1e}",
        ]
        for r in records
    ]
    head = ["runner", "error of a gradient, median", "90 %", "most"]
    head += ["first loss", "last of 20", "largest difference from upstream's"]
    return ["", *table(head, rows)]


def pet_tables(records: list[Record]) -> list[str]:
    """Steps from the device and from the host, memory, and compilation."""
    rows = [
        [
            r["case"].removeprefix("pet, default, "),
            r["runner"],
            f"{r['step_ms']:.1f}",
            f"{r['from_host_ms']:.1f}",
            f"{r['peak_gib']:.2f}",
            f"{r['compile_s']:.0f}" if r.get("compile_s") else "-",
        ]
        for r in records
        if "step_ms" in r
    ]
    head = ["case", "runner", "ms per step", "with the batch on the host", "peak GiB", "compile, s"]
    return ["", *table(head, rows)]
