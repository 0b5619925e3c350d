"""Writes benchmarks/README.md's tables and picture from the records of whole steps.

Usage: python -m benchmarks.report STEPS.jsonl TRAINING.jsonl ...
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

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
                    f"{r['step_ms']:.1f}" if "step_ms" in r else "-",
                    f"{100 * r['mfu']:.0f} %" if "mfu" in r else "-",
                ]
            )
        head = ["runner", "budget GiB", "predicted peak", "measured peak", "ms per step", "MFU"]
        lines += ["", f"`{case}`:", "", *table(head, rows)]
    return lines


def plot(records: list[Record]) -> None:
    """Throughput against measured peak, one panel per case; best is up and to the left."""
    cases = list(dict.fromkeys(r["case"] for r in records))
    figure, axes = plt.subplots(1, len(cases), figsize=(7 * len(cases), 4.5), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        for r in (r for r in records if r["case"] == case and "peak_gib" in r):
            ours = r["runner"].startswith("fastft")
            point = (r["peak_gib"], r["samples_per_second"])
            axis.plot(*point, "s" if ours else "o", color="C3" if ours else "C0")
            axis.annotate(r["runner"], point, xytext=(6, -3), textcoords="offset points", size=8)
        axis.set(xlabel="measured peak, GiB", ylabel="samples per second", title=case)
        axis.margins(x=0.25, y=0.1)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    """Replaces what stands between the two marks."""
    lines, training = [], []
    for path in map(Path, sys.argv[1:]):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        lines += ["", f"`results/{path.name}`, one {device(records[0])}."]
        if records[0]["benchmark"] == "training":
            lines += training_tables(records)
            training += records
        else:
            lines += step_tables(records)
    if training:
        plot(training)
        lines += ["", "![samples per second against peak memory](results/training.png)"]
    head, rest = README.read_text().split(BEGIN)
    README.write_text("\n".join([head + BEGIN, *lines, "", END + rest.split(END)[1]]))


if __name__ == "__main__":
    main()
