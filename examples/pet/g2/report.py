"""The story's runs as a record, a table and learning curves.

Without an argument, of the runs in `runs/g2`, where all three are written to; else of a record:

    python examples/pet/g2/report.py benchmarks/results/2026-11-26-cpu-pet-g2.jsonl
"""

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import matplotlib as mpl
import numpy as np
import torch

from fastft.runtime import environment

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator, ScalarFormatter

FOLDER = Path("runs/g2")
COLOURS = {
    "scratch": "#6e6e6e",
    "full": "#c2511b",
    "heads": "#805ad5",
    "inherit_heads": "#2b6cb0",
    "multi-fidelity": "#3f7d32",
}
SPLITS = {"held out": "molecules of the old level alone", "unseen": "molecules of neither level"}
Record = dict[str, Any]


def collect() -> Record:
    """Errors in meV per atom and meV per angstrom, seconds, and the machine."""
    seconds = json.loads((FOLDER / "seconds.json").read_text())
    rows = []
    for name, (wall, cpu) in seconds.items():
        way, number, draw = [*name.rsplit("-", 2), "", ""][:3] if "-" in name else (name, "0", "0")
        lines = (FOLDER / name / "metrics.jsonl").read_text().splitlines()
        last = next(r for line in reversed(lines) if "validation/loss" in (r := json.loads(line)))
        test = json.loads((FOLDER / name / "evaluation-test.json").read_text())["values"]
        held_out = {key.removeprefix("validation/"): value for key, value in last.items()}
        rows.append(
            {
                "way": way,
                "structures": int(number),
                "draw": int(draw),
                "held out": _errors(held_out),
                "unseen": _errors(test),
                "seconds": round(wall, 1),
                "process_seconds": round(cpu, 1),
            }
        )
    return {
        "benchmark": "pet-g2",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": rows,
        "levels_differ": {"held out": _difference("held-out"), "unseen": _difference("unseen")},
        "total_seconds": round(sum(wall for wall, _ in seconds.values()), 1),
        "process_seconds": round(sum(cpu for _, cpu in seconds.values()), 1),
        "machine": environment(torch.device("cpu")),
    }


def table(record: Record) -> str:
    """Root-mean-square errors, averaged over draws, as Markdown."""
    numbers = sorted({row["structures"] for row in record["rows"]} - {0})
    head = ["", *(f"{n} structures" for n in numbers)]
    lines = []
    for split, title in SPLITS.items():
        lines += [f"{title.capitalize()}:", "", _line(head), _line(["---"] * len(head))]
        for way in _ways(record):
            cells = [_cell(record, way, number, split) for number in numbers]
            lines.append(_line([f"`{way}`" if "_" in way else way, *cells]))
        lines.append("")
    return "\n".join(lines)


def draw(record: Record, path: Path) -> None:
    """Errors of forces by number of structures; a dot for each draw, lines through their means."""
    numbers = sorted({row["structures"] for row in record["rows"]} - {0})
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, (split, title) in zip(axes, SPLITS.items(), strict=True):
        for way in _ways(record):
            colour = COLOURS[way]
            found = [_forces(record, way, number, split) for number in numbers]
            means = [np.mean(each) for each in found]
            axis.plot(numbers, means, color=colour, label=way)
            for number, each in zip(numbers, found, strict=True):
                axis.plot([number] * len(each), each, "o", color=colour, markersize=4)
        (old,) = _forces(record, "pretrain", 0, split)
        axis.axhline(old, color="black", linestyle="--", linewidth=1, label="pretrained, old level")
        axis.set(xscale="log", yscale="log", title=title, xlabel="structures of the new level")
        axis.set_xticks(numbers, [str(number) for number in numbers], minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("RMSE of forces, meV per angstrom")
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(ScalarFormatter())
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _errors(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 1) for key, value in values.items() if "_mev_" in key}


def _difference(name: str) -> float:
    """By how much the levels' forces differ, root mean square in meV per angstrom."""
    new, old = (
        np.concatenate([atoms.get_forces() for atoms in _read(FOLDER / "data" / f"{file}.xyz")])
        for file in (name, f"{name}-old")
    )
    return round(1e3 * float(np.sqrt(np.mean((new - old) ** 2))), 1)


def _read(path: Path) -> Sequence[Any]:
    frames = ase.io.read(path, ":")
    assert isinstance(frames, list)
    return frames


def _ways(record: Record) -> list[str]:
    found = {row["way"] for row in record["rows"]}
    return [way for way in COLOURS if way in found]


def _rows(record: Record, way: str, number: int) -> list[Record]:
    return [r for r in record["rows"] if (r["way"], r["structures"]) == (way, number)]


def _forces(record: Record, way: str, number: int, split: str) -> list[float]:
    name = "forces" if way == "pretrain" else "forces[energy/gfn2]"
    rows = _rows(record, way, number)
    return [row[split][f"{name}_rmse_mev_per_angstrom"] for row in rows]


def _cell(record: Record, way: str, number: int, split: str) -> str:
    rows = _rows(record, way, number)
    energies = [row[split]["energy/gfn2_rmse_mev_per_atom"] for row in rows]
    return f"{np.mean(_forces(record, way, number, split)):.0f} / {np.mean(energies):.0f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    if len(sys.argv) > 1:
        record = json.loads(Path(sys.argv[1]).read_text())
    else:
        record = collect()
        (FOLDER / "record.jsonl").write_text(json.dumps(record) + "\n")
    print(table(record))
    draw(record, FOLDER / "learning-curves.png")


if __name__ == "__main__":
    main()
