"""Writes benchmarks/README.md's tables and pictures from the records of whole steps.

Usage: python -m benchmarks.report STEPS.jsonl TRAINING.jsonl GRAPHS.jsonl COMPILE.jsonl
    AURORA.jsonl PARITY.jsonl PET.jsonl ...
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.models_report import aurora_tables, parity_tables, pet_tables, plot_aurora
from benchmarks.table import table

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent
README, PLOT = ROOT / "README.md", ROOT / "results" / "training.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Record = dict[str, Any]
LABELS = {"vit": "ViT-B/16, batch 128", "gpt": "GPT-like stack, 0.5e9 parameters, 4,096 tokens"}


def device(record: Record) -> str:
    """The card's name, wherever a record holds it."""
    return record["device"] if "device" in record else record["machine"]["device"]["name"]


def step_tables(records: list[Record]) -> list[str]:
    """Time, memory and loss of whole steps beside their peers, by case."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in records):
        rows = []
        for r in (r for r in records if r["case"] == case):
            time = f"{r['step_ms']:.1f}" if "step_ms" in r else "-"
            rows.append([r["runner"], time, f"{r['peak_gib']:.2f}", f"{r['gap_to_eager']:.3f}"])
        head = ["runner", "ms per step", "peak GiB", "largest gap of the loss curve to eager's"]
        lines += ["", f"{LABELS.get(case, case)}, bf16:", "", *table(head, rows)]
    return lines


def training_tables(records: list[Record]) -> list[str]:
    """Time and memory of ways to keep less, and of fastft's plans, by case."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in records):
        rows = []
        for r in (r for r in records if r["case"] == case):
            budget, predicted = r.get("budget_gib"), r.get("predicted_gib")
            rows.append(
                [
                    r["runner"],
                    "-" if budget is None else f"{budget:.1f}",
                    "-" if predicted is None else f"{predicted:.2f}",
                    f"{r['peak_gib']:.2f}" if "peak_gib" in r else "out of memory",
                    f"{r['reserved_gib']:.1f}" if "reserved_gib" in r else "-",
                    f"{r['step_ms']:.1f}" if "step_ms" in r else "-",
                    f"{100 * r['mfu']:.0f} %" if "mfu" in r else "-",
                ]
            )
        head = ["runner", "budget GiB", "predicted peak", "measured peak", "reserved"]
        head += ["ms per step", "MFU"]
        lines += ["", f"`{case}`:", "", *table(head, rows)]
    return lines


def graph_tables(records: list[Record]) -> list[str]:
    """Steps of small kernels, as the host launches them and replayed from a CUDA graph."""
    rows = [
        [
            r["case"],
            r["compile"],
            f"{r['uncaptured_ms']:.1f}",
            f"{r['captured_ms']:.1f}" if "captured_ms" in r else r["decision"],
            f"{r['uncaptured_reserved_gib']:.2f}",
            f"{r.get('captured_reserved_gib', 0):.2f}",
        ]
        for r in records
    ]
    head = ["case", "compile", "ms per step", "captured", "reserved GiB", "captured"]
    return ["", *table(head, rows)]


def compile_tables(records: list[Record]) -> list[str]:
    """Seconds until the first step is done."""
    rows = [[r["case"], r["cache"], f"{r['first_s']:.1f}", f"{r['second_s']:.2f}"] for r in records]
    return ["", *table(["case", "compile cache", "first step, s", "second step, s"], rows)]


# Runners whose name begins so: what they are, how they are drawn, and what stands beside them.
KINDS = {
    "fastft, ": ("fastft at a budget", "s", "C3"),
    "activation_memory_budget ": ("by hand: torch's activation_memory_budget", "o", "C0"),
    "checkpoint ": ("by hand: checkpointing", "^", "C0"),
    "keep ": ("by hand: keep all", "v", "C0"),
    "torch.compile, ": ("torch.compile of the model", "D", "grey"),
    "eager, ": ("eager", "X", "grey"),
}


def plot(records: list[Record]) -> None:
    """Throughput against measured peak, a panel per case and card; best is up and to the left.

    Of two records with one runner and budget, the last is drawn.
    """
    panels: dict[tuple[str, str], dict[Any, Record]] = {}
    for r in (r for r in records if "," not in r["case"] and "peak_gib" in r):
        drawn = panels.setdefault((r["case"], device(r)), {})
        drawn[r["runner"], r.get("budget_gib")] = r
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5.2), squeeze=False)
    for axis, ((case, card), drawn) in zip(axes[0], panels.items(), strict=True):
        for r in drawn.values():
            start = next(start for start in KINDS if r["runner"].startswith(start))
            label, marker, colour = KINDS[start]
            point = (r["peak_gib"], r["samples_per_second"])
            axis.plot(*point, marker, color=colour, label=label)
            short = r["runner"].removeprefix(start).removesuffix(" block").replace("one block", "1")
            place, side = ((-7, 4), "right") if start == "fastft, " else ((7, -9), "left")
            axis.annotate(short, point, xytext=place, textcoords="offset points", size=8, ha=side)
        title = f"{case}, {card}"
        axis.set(xlabel="measured peak, GiB", ylabel="samples per second", title=title)
        axis.margins(x=0.2, y=0.1)
        axis.grid(alpha=0.3)
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(KINDS))
    figure.savefig(PLOT, dpi=110)


TABLES: dict[str, Callable[[list[Record]], list[str]]] = {
    "end_to_end": step_tables,
    "training": training_tables,
    "graphs": graph_tables,
    "compile_time": compile_tables,
    "aurora": aurora_tables,
    "aurora_parity": parity_tables,
    "pet": pet_tables,
}


def kind_of(record: Record) -> str:
    """Of a file's records; Aurora and PET are measured as other training is."""
    name = record.get("case", "").partition(",")[0]
    return name if name in TABLES else record["benchmark"]


def main() -> None:
    """Replaces what stands between the two marks."""
    lines, training = [], []
    for path in map(Path, sys.argv[1:]):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        lines += ["", f"`results/{path.name}`, one {device(records[0])}."]
        tables = TABLES[kind_of(records[0])]
        lines += tables(records)
        if tables is aurora_tables and (picture := plot_aurora(records, path)):
            lines += ["", f"![time of a step by kind of kernel](results/{picture.name})"]
        training += records if tables is training_tables else []
    if training:
        plot(training)
        lines += ["", "![samples per second against peak memory](results/training.png)"]
    head, rest = README.read_text().split(BEGIN)
    README.write_text("\n".join([head + BEGIN, *lines, "", END + rest.split(END)[1]]))


if __name__ == "__main__":
    main()
