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
    """Time, memory and what the time is spent on; what is not upstream's step has no factor."""
    upstream = {r["case"]: r["step_ms"] for r in records if _is_upstream(r) and "step_ms" in r}
    rows = []
    for r in records:
        case, runner = r["case"].removeprefix("aurora, "), r["runner"]
        if "step_ms" not in r:
            if _is_upstream(r):
                rows.append([case, runner, "out of memory", *["-"] * (len(KINDS) + 4)])
            continue
        compared = r["case"] in upstream and " steps" not in runner
        factor = f"{upstream[r['case']] / r['step_ms']:.2f}" if compared else "-"
        memory = [f"{r['peak_gib']:.1f}", f"{r['reserved_gib']:.1f}"]
        kinds = [f"{value:.0f}" for value in _kinds(r)]
        rows.append([case, runner, f"{r['step_ms']:.0f}", factor, *memory, *kinds])
    head = ["case", "runner", "ms per step", "times faster", "peak GiB", "reserved GiB"]
    return ["", *table([*head, *KINDS, "other"], rows)]


def _is_upstream(record: Record) -> bool:
    return record["runner"] == UPSTREAM


def _kinds(record: Record) -> list[float]:
    """Milliseconds by kind; what no kernel of these kinds takes is other, idle time among it."""
    found = [record["kinds_ms"][kind] for kind in KINDS]
    return [*found, max(0.0, record["step_ms"] - sum(found))]


def plot_aurora(records: list[Record], path: Path) -> Path | None:
    """A bar for each runner of upstream's first step, beside the records; the file, if there are
    runners to compare."""
    measured = [r for r in records if "step_ms" in r and " steps" not in r["runner"]]
    case = next((r["case"] for r in measured if _is_upstream(r)), None)
    shown = sorted((r for r in measured if r["case"] == case), key=lambda r: r["step_ms"])
    if len(shown) < 2:
        return None
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.5 * len(shown)))
    for place, r in enumerate(shown):
        left = 0.0
        for kind, colour, ms in zip((*KINDS, "other"), COLOURS, _kinds(r), strict=True):
            axis.barh(place, ms, left=left, color=colour, label=None if place else kind)
            left += ms
        axis.annotate(f" {r['step_ms']:.0f}", (left, place), va="center")
    axis.set_yticks(range(len(shown)), [r["runner"] for r in shown])
    axis.set(xlabel="milliseconds of a step", xlim=(0, 1.08 * shown[-1]["step_ms"]))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    figure.legend(loc="upper center", ncols=8, fontsize=9, frameon=False)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target


def parity_tables(records: list[Record]) -> list[str]:
    """How far gradients are from float32, and how far losses from upstream's."""
    rows = []
    for r in records:
        errors = [f"{100 * r[share]:.2f} %" for share in ("p50%", "p90%", "p100%")]
        losses = ["-"] * 3
        if r["losses"]:
            losses = [*(f"{r['losses'][i]:.4f}" for i in (0, -1)), f"{r['apart']:.1e}"]
        rows.append([r["runner"], *errors, *losses])
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
            f"{r['reserved_gib']:.2f}",
            f"{r['compile_s']:.0f}" if r.get("compile_s") else "-",
        ]
        for r in sorted(records, key=lambda r: r["case"])
        if "step_ms" in r
    ]
    head = ["case", "runner", "ms per step", "with the batch on the host", "reserved GiB"]
    head += ["compile, s"]
    return ["", *table(head, rows)]
