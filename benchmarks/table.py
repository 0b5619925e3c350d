"""Writes kernels/README.md's tables and the plot of share of copy against N from the records.

Usage: python -m benchmarks.table benchmarks/results/RECORDS.jsonl [benchmarks/results/SWEEP.jsonl]
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from fastft_kernels.row_schedule import backward_schedule

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
README, PLOT = ROOT / "kernels" / "README.md", ROOT / "benchmarks" / "results" / "layer_norm.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PROVIDERS = ("fastft", "eager", "compile", "liger")
Record = dict[str, Any]


def host_bound(record: Record) -> bool:
    """True where the clock may have measured the host: records before the sleep was added."""
    slept = record.get("timing") == "slept"
    return not slept and record.get("host_us", 0.0) > 0.85 * record["p50_us"]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(record: Record | None) -> str:
    if record is None:
        return ""
    if host_bound(record):
        return "host"
    return f"{record['share']:.2f}"


def norm_tables(records: list[Record]) -> list[str]:
    """Per op: share of a copy by N, direction and provider."""
    found = {
        (r["op"], r["direction"], r["provider"], r["rows"] == 4096, r["columns"]): r
        for r in records
        if "direction" in r
    }
    columns = sorted({key[4] for key in found})
    lines = []
    for op in dict.fromkeys(key[0] for key in found):
        for small in (False, True):
            rows = []
            for direction in ("forward", "backward"):
                for provider in PROVIDERS:
                    cells = [cell(found.get((op, direction, provider, small, n))) for n in columns]
                    if any(cells):
                        rows.append([direction, provider, *cells])
            if rows:
                size = "4,096 rows, replayed from a CUDA graph" if small else "2^28 elements, bf16"
                lines += ["", f"`{op}`, {size}, share of a copy by N:", ""]
                lines += table(["direction", "provider", *map(str, columns)], rows)
    return lines


def sweep_backward(records: list[Record]) -> dict[int, float]:
    """Share of a copy by N: backward's own two launches, with the schedule in use."""
    found = {(r["what"], r["schedule"]): r["share"] for r in records}
    columns = (512, 1024, 2048, 4096, 8192)
    in_use = {n: str(backward_schedule(n, 4, torch.device("cpu"))) for n in columns}
    keys = {n: (f"backward {n}", schedule) for n, schedule in in_use.items()}
    return {n: found[key] for n, key in keys.items() if key in found}


def sweep_table(shares: dict[int, float]) -> list[str]:
    rows = [["backward", "fastft, its two launches alone", *(f"{s:.2f}" for s in shares.values())]]
    head = "`layer_norm`, 2^28 elements, bf16, without autograd around it, share of a copy by N:"
    return ["", head, "", *table(["direction", "provider", *map(str, shares)], rows)]


def optimizer_tables(records: list[Record]) -> list[str]:
    rows = []
    for r in records:
        if "direction" not in r:
            what = r["op"]
            if what == "adam":
                what += f", {r['state']} state, {r['groups']} groups"
                what += ", with statistics" if r["monitor"] else ""
            ms, host = f"{r['p50_us'] / 1e3:.2f}", f"{r['host_us'] / 1e3:.2f}"
            rows.append([what, r["provider"], ms, f"{r['share']:.2f}", host])
    header = ["1.2e9 float32 parameters in 668 tensors", "provider", "ms", "share", "host ms"]
    return ["", *table(header, rows)]


def plot(records: list[Record], alone: dict[int, float]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        for colour, provider in enumerate(PROVIDERS):
            points = sorted(
                (r["columns"], r["share"])
                for r in records
                if r.get("direction") == direction
                and (r["op"], r["provider"]) == ("layer_norm", provider)
                and r["rows"] != 4096
                and not host_bound(r)
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o", color=f"C{colour}", label=provider
                )
        if alone and direction == "backward":
            label = "fastft, its two launches alone (sweep)"
            axis.plot(*zip(*alone.items(), strict=True), "o--", color="C0", label=label)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="N", title=f"layer norm {direction}, bf16, 2^28 elements")
        axis.set_xticks([512, 1024, 2048, 4096, 8192], ["512", "1024", "2048", "4096", "8192"])
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.legend(loc="lower right")
    axes[0].set(ylabel="share of a copy", ylim=(0, 1.1))
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Replaces what stands between the two marks."""
    path = Path(sys.argv[1])
    records = read(path)
    first = records[0]
    lines = [
        f"Measured {first['date']} on one {first['device']}: a copy moves "
        f"{first['copy_tb_per_s']} TB/s; torch {first['torch']}, Triton {first['triton']}; "
        f"medians; `benchmarks/results/{path.name}`.",
    ]
    if any(host_bound(r) for r in records):
        lines += ["", "`host`: the host took longer than the kernels, so no device time is known."]
    lines += [*optimizer_tables(records), *norm_tables(records)]
    alone: dict[int, float] = {}
    for sweep in map(Path, sys.argv[2:]):
        alone = sweep_backward(read(sweep))
        lines += [*sweep_table(alone), "", f"(`benchmarks/results/{sweep.name}`)"]
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text("\n".join([head + BEGIN, *lines, END + rest.split(END)[1]]))
    plot(records, alone)


if __name__ == "__main__":
    main()
