"""The picture of a step's memory: written whole, with every part that the plan has."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from fastft.memory.picture import _BUDGET, _LAYERS, Panel, draw_timeline
from fastft.memory.solve import BlockCosts, Choice, StepCosts

GIB = 2**30


def costs(blocks: int) -> StepCosts:
    keep = Choice("keep all", GIB, GIB + GIB // 8, GIB // 2, 1.0)
    recompute = Choice("recompute all", GIB // 8, GIB, GIB, 1.3)
    return StepCosts(
        blocks=tuple(BlockCosts(f"blocks.{i}", (keep, recompute), GIB // 4) for i in range(blocks)),
        fixed_bytes=2 * GIB,
        before_bytes=GIB // 4,
        before_backward_bytes=GIB // 4,
        tail_bytes=GIB // 2,
        tail_gradient_bytes=GIB // 8,
        update_bytes=GIB // 8,
        other_seconds=0.5,
    )


def draw(path: Path, blocks: int, budgets: list[int]) -> np.ndarray:
    """Pixels, `[H, W, 3]` of 0 to 255."""
    panels = [Panel(f"{b // GIB} GiB", [i % 2] * blocks, b) for i, b in enumerate(budgets)]
    draw_timeline(costs(blocks), panels, path, "Memory over one step")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def share(pixels: np.ndarray, colour: str) -> float:
    """Of the picture in a colour, to a step of rounding."""
    wanted = np.array([255 * channel for channel in to_rgb(colour)])
    return float((np.abs(pixels - wanted).max(axis=-1) <= 1).mean())


def longest_row(pixels: np.ndarray, colour: str) -> float:
    """The most of any row in a colour."""
    return max(share(row, colour) for row in pixels)


@pytest.mark.parametrize(("blocks", "budgets"), [(1, 1), (12, 2), (24, 4), (3, 5)])
def test_every_part_is_there_in_its_colour(tmp_path: Path, blocks: int, budgets: int) -> None:
    pixels = draw(tmp_path / "plans" / "memory.png", blocks, [4 * GIB] * budgets)
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["memory.png"]
    for _, _, colour in _LAYERS:
        assert share(pixels, colour) > 0.005
    assert share(pixels, _BUDGET) > 0.0005
    assert share(pixels, "white") > 0.3


def test_the_areas_are_those_of_the_plan(tmp_path: Path) -> None:
    kept = share(draw(tmp_path / "a.png", 24, [40 * GIB]), _LAYERS[1][2])
    both = draw(tmp_path / "b.png", 24, [40 * GIB, 40 * GIB])
    left, right = np.array_split(both, 2, axis=1)
    # The second panel recomputes all, and keeps an eighth.
    assert share(right, _LAYERS[1][2]) < 0.4 * share(left, _LAYERS[1][2])
    assert share(left, _LAYERS[1][2]) == pytest.approx(kept, rel=0.3)


def test_a_budget_above_the_scale_draws_no_line(tmp_path: Path) -> None:
    near = draw(tmp_path / "a.png", 4, [7 * GIB])
    far = draw(tmp_path / "b.png", 4, [700 * GIB])
    # Dashes from side to side, and text in both.
    assert longest_row(near, _BUDGET) > 0.4
    assert 0 < longest_row(far, _BUDGET) < 0.2
    # The scale is that of the plan: its areas are as large as before.
    assert share(far, _LAYERS[0][2]) == pytest.approx(share(near, _LAYERS[0][2]), rel=0.02)
