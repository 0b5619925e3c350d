"""Memory over a training step as a picture, one panel per budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.atomic import write_file_atomically
from fastft.memory.solve import Moment, StepCosts, timeline

_GIB = 2**30
# From the bottom to the top: name, what of a `Moment`, colour.
_LAYERS = (
    ("weights, optimizer, buffers", "fixed", "#7d8794"),
    ("kept activations", "kept", "#2b6cb0"),
    ("gradients", "gradients", "#d69a1c"),
    ("transient", "transient", "#c2511b"),
)
_INK, _BUDGET = "#222222", "#b0123b"
# Panels side by side; more go below.
_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One plan: `picks` as in `timeline`, and the bytes that torch's allocator may take."""

    title: str
    picks: Sequence[int]
    budget_bytes: int


def draw_timeline(costs: StepCosts, panels: Sequence[Panel], path: Path, title: str) -> None:
    """Writes a PNG: the highest allocation of each part of the step, by what it is.

    Blocks are equally wide, in forward order and then in backward order: widths are no times. All
    panels have one scale; a budget far above every peak is said, not drawn.

    Args:
        panels: at least one.
    """
    # Not pyplot, which keeps a global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Two rows of two rather than three and one.
    columns = 2 if len(panels) == 4 else min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 4.6 * columns, 1.3 + 3.5 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, columns, sharey=True, squeeze=False)
    drawn = [timeline(costs, panel.picks) for panel in panels]
    top = 1.3 * max(moment.bytes for moments in drawn for moment in moments) / _GIB
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_axis_off()
            continue
        _draw(axes, drawn[index], len(costs.blocks))
        axes.set_ylim(0, top)
        _draw_budget(axes, panels[index].budget_bytes / _GIB, top)
        axes.set_title(panels[index].title, loc="left", fontsize=10, color=_INK)
        if index % columns == 0:
            axes.set_ylabel("GiB", color=_INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    write_file_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw(axes: Any, moments: Sequence[Moment], blocks: int) -> None:
    """The stack of one plan, its parts named below, and its peak marked."""
    # Parts without blocks are wide enough for their names.
    lone = max(1.0, blocks / 4)
    parts = {"forward": blocks, "heads\nand loss": 1, "backward": blocks + 1, "update": 1}
    widths = [1.0] * blocks + [lone] + [1.0] * blocks + [lone / 2, lone]
    edges = [0.0]
    for width in widths:
        edges.append(edges[-1] + width)
    below = [0.0] * (len(moments) + 1)
    for label, field, colour in _LAYERS:
        sizes = [getattr(moment, field) / _GIB for moment in moments]
        above = [low + size for low, size in zip(below, [*sizes, sizes[-1]], strict=True)]
        axes.fill_between(edges, below, above, step="post", color=colour, label=label, linewidth=0)
        below = above
    start, ends = 0, []
    for count in parts.values():
        ends.append((edges[start], edges[start + count]))
        start += count
    axes.set_xlim(0, edges[-1])
    axes.set_xticks([(left + right) / 2 for left, right in ends], list(parts), fontsize=9)
    axes.tick_params(axis="x", length=0, colors=_INK)
    axes.tick_params(axis="y", colors=_INK, labelsize=9)
    for _, right in ends[:-1]:
        axes.axvline(right, color="white", linewidth=1.2)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    at = max(range(len(moments)), key=lambda index: moments[index].bytes)
    peak, middle = moments[at].bytes / _GIB, (edges[at] + edges[at + 1]) / 2
    axes.plot(middle, peak, marker="v", color=_INK, markersize=5, clip_on=False)
    side = "right" if middle > edges[-1] * 0.75 else "left" if middle < edges[-1] / 4 else "center"
    axes.annotate(
        f"peak {peak:.2f}",
        (middle, peak),
        xytext=(0, 6),
        textcoords="offset points",
        ha=side,
        fontsize=9,
        color=_INK,
    )


def _draw_budget(axes: Any, budget: float, top: float) -> None:
    if budget > top:
        text, height, below = f"budget {budget:.1f}, above this scale ↑", top, True
    else:
        axes.axhline(budget, color=_BUDGET, linewidth=1.4, linestyle=(0, (5, 3)))
        text, height, below = f"budget {budget:.2f}", budget, budget > 0.93 * top
    axes.annotate(
        text,
        (0, height),
        xycoords=("axes fraction", "data"),
        xytext=(4, -4 if below else 4),
        textcoords="offset points",
        va="top" if below else "bottom",
        fontsize=9,
        color=_BUDGET,
        # Where nothing fits, the line runs through the plan.
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
    )
