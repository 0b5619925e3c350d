"""Writes kernels/README.md's tables, by card, and the plot of share of copy against N.

Usage: python -m benchmarks.table benchmarks/results/RECORDS.jsonl ...
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
README, PLOT = ROOT / "kernels" / "README.md", ROOT / "benchmarks" / "results" / "layer_norm.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PROVIDERS = ("fastft", "fastft, bf16 weights", "eager", "compile", "compile, early launch")
PROVIDERS += ("compile, fp32 weights", "liger", "quack", "quack, tuned")
ATTENTION = ("fastft", "torch", "torch.compile")
Record = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(record: Record | None) -> str:
    if record is None:
        return ""
    return f"{record['share']:.2f}"


def what_of(record: Record) -> tuple[Any, ...]:
    """What a record is of: two with the same are two measurements of one thing."""
    names = ("op", "direction", "provider", "rows", "columns", "state", "groups", "monitor")
    names += ("size", "shifted", "queries", "device")
    return tuple(str(record.get(name)) for name in names)


def norm_tables(records: list[Record]) -> list[str]:
    """Per op: share of a copy by N, direction and provider."""
    found = {
        (r["op"], r["direction"], r["provider"], r["rows"] == 4096, r["columns"]): r
        for r in records
        if "rows" in r
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


def attention_table(records: list[Record]) -> list[str]:
    """Microseconds of each provider, and our share of a copy; Aurora's sizes at 0.25 degrees."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        if r["op"] == "window_attention":
            size = " x ".join(map(str, r["size"]))
            what = f"`window_attention`, {size}, {r['heads']} heads"
            what += ", shifted" if r["shifted"] else ""
            what += f", {r['images']} images, 32 columns" if "images" in r else ""
        elif r["op"] == "short_attention":
            what = f"`short_attention`, {r['samples']} samples, {r['queries']} x {r['keys']} tokens"
            # Records of the first day have none: all were of 64.
            what += f", {r['columns']} columns" if r.get("columns", 64) != 64 else ""
        else:
            continue
        found.setdefault((what, r["direction"]), {})[r["provider"]] = r
    rows = []
    for (what, direction), by in found.items():
        times = [f"{by[p]['p50_us']:.0f}" if p in by else "-" for p in ATTENTION]
        rows.append([what, direction, *times, cell(by.get("fastft"))])
    header = ["bf16, heads of 64 columns", "direction", *(f"{p}, us" for p in ATTENTION), "share"]
    return ["", *table(header, rows)] if rows else []


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
    return ["", *table(header, rows)] if rows else []


def plot(by_card: dict[str, list[Record]]) -> None:
    """A row of two plots for each card, forward and backward."""
    size = 11, 4 * len(by_card) + 0.8
    figure, axes = plt.subplots(len(by_card), 2, figsize=size, sharey=True, squeeze=False)
    shown = {}
    for pair, (card, records) in zip(axes, by_card.items(), strict=True):
        pair[0].set(ylabel="share of a copy", ylim=(0, 1.1))
        for axis, direction in zip(pair, ("forward", "backward"), strict=True):
            for colour, provider in enumerate(PROVIDERS):
                points = sorted(
                    (r["columns"], r["share"])
                    for r in records
                    if r.get("direction") == direction
                    and (r["op"], r["provider"]) == ("layer_norm", provider)
                    and r["rows"] != 4096
                )
                if points:
                    style = {"marker": "o", "color": f"C{colour}", "label": provider}
                    (shown[provider],) = axis.plot(*zip(*points, strict=True), **style)
            axis.set_xscale("log", base=2)
            axis.set_xticks([512, 1024, 2048, 4096, 8192], ["512", "1024", "2048", "4096", "8192"])
            axis.set(xlabel="N", title=f"{direction}, {card}")
            axis.axhline(1.0, color="grey", linewidth=0.8)
    figure.suptitle("layer norm, bf16, 2^28 elements")
    figure.tight_layout(rect=(0, 0.6 / size[1], 1, 1))
    figure.legend(shown.values(), shown, loc="lower center", ncols=5)
    figure.savefig(PLOT, dpi=120)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Replaces what stands between the two marks."""
    paths = [Path(name) for name in sys.argv[1:]]
    lines = []
    for path in paths:
        first = read(path)[0]
        lines += [
            f"`benchmarks/results/{path.name}`: {first['date']}, one {first['device']}, where a",
            f"copy moves {first['copy_tb_per_s']} TB/s; torch {first['torch']}, Triton "
            f"{first['triton']}; medians.",
        ]
    # A later file replaces what it has measured again.
    records = list({what_of(r): r for path in paths for r in read(path)}.values())
    cards = dict.fromkeys(r["device"] for r in records)
    by_card = {card: [r for r in records if r["device"] == card] for card in cards}
    for card, of in by_card.items():
        lines += ["", f"### {card}", *optimizer_tables(of), *attention_table(of), *norm_tables(of)]
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text("\n".join([head + BEGIN, *lines, END + rest.split(END)[1]]))
    plot(by_card)


if __name__ == "__main__":
    main()
