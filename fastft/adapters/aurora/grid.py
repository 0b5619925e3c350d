"""Latitudes and longitudes as Aurora wants them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """How the rows and columns of a file become Aurora's.

    Attributes:
        lat: float32 `[H]`, strictly decreasing.
        lon: float32 `[W]`, strictly increasing in [0, 360).
        rows, columns: of the file, in that order; columns in runs that follow each other.
        found_lat, found_lon: the file's first and last.
        flipped: whether the file's latitudes increase.
        rolled: whether columns change their order.
    """

    lat: np.ndarray
    lon: np.ndarray
    rows: slice | np.ndarray
    columns: tuple[slice | np.ndarray, ...]
    found_lat: tuple[float, float]
    found_lon: tuple[float, float]
    flipped: bool
    rolled: bool

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`[..., lat, lon]` of the file as float32 `[..., H, W]`."""
        values = values[..., self.rows, :]
        if len(self.columns) == 1:
            return np.ascontiguousarray(values[..., self.columns[0]], np.float32)
        # Run by run: an order of single columns takes several times as long.
        out = np.empty((*values.shape[:-1], len(self.lon)), np.float32)
        first = 0
        for run in self.columns:
            piece = values[..., run]
            out[..., first : first + piece.shape[-1]] = piece
            first += piece.shape[-1]
        return out


def as_slice(index: np.ndarray) -> slice | np.ndarray:
    """Evenly spaced indices as a slice, which copies nothing and reads one block."""
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if step == 0 or (np.diff(index) != step).any():
        return index
    stop = int(index[-1]) + step
    return slice(int(index[0]), stop if stop >= 0 else None, step)


def make_grid(lat: np.ndarray, lon: np.ndarray, patch_size: int, crop: bool) -> Grid | list[str]:
    """The grid of a file's coordinates, or what is wrong with them."""
    if lat.ndim != 1 or lon.ndim != 1 or not lat.size or not lon.size:
        return [
            f"latitude and longitude must be rows of numbers; got shapes {list(lat.shape)} and"
            f" {list(lon.shape)}; interpolate to a regular grid"
        ]
    lat, lon = lat.astype(np.float64), lon.astype(np.float64)
    problems = []
    rows = _latitude_order(lat)
    columns = _longitude_order(lon)
    if isinstance(rows, str):
        problems.append(rows)
    if isinstance(columns, str):
        problems.append(columns)
    if isinstance(rows, str) or isinstance(columns, str):
        return problems
    keep = [_fitting(len(rows), patch_size, True), _fitting(len(columns), patch_size, False)]
    sizes = [len(rows), len(columns)]
    if 0 in keep or (keep != sizes and not crop):
        return [_size_message(sizes, keep, patch_size)]
    rows, columns = _middle(rows, keep[0]), _middle(columns, keep[1])
    return Grid(
        lat=lat[rows].astype(np.float32),
        lon=_wrapped(lon[columns]).astype(np.float32),
        rows=as_slice(rows),
        columns=tuple(as_slice(run) for run in _runs(columns)),
        found_lat=(float(lat[0]), float(lat[-1])),
        found_lon=(float(lon[0]), float(lon[-1])),
        flipped=bool(lat[0] < lat[-1]),
        rolled=bool((np.diff(columns) != 1).any()),
    )


def _latitude_order(lat: np.ndarray) -> np.ndarray | str:
    order = np.arange(len(lat))
    if len(lat) > 1 and lat[0] < lat[-1]:
        order = order[::-1]
    ends = f"{len(lat)} from {lat[0]:g} to {lat[-1]:g}"
    if not (np.abs(lat) <= 90).all():
        return f"latitudes must lie in [-90, 90] degrees; got {ends}; check the coordinate"
    if not (np.diff(lat[order]) < 0).all():
        return f"latitudes must increase or decrease throughout; got {ends}; sort the rows"
    return order


def _longitude_order(lon: np.ndarray) -> np.ndarray | str:
    ends = f"{len(lon)} from {lon[0]:g} to {lon[-1]:g}"
    if not (np.abs(lon) <= 720).all():
        return f"longitudes must be degrees; got {ends}; check the coordinate"
    wrapped = _wrapped(lon)
    order = np.argsort(wrapped, kind="stable")
    steps = np.diff(wrapped[order])
    if (steps <= 0).any():
        twice = wrapped[order][:-1][steps <= 0][0]
        return f"longitudes must differ; got {ends}, with {twice:g} twice; drop the second"
    found = np.abs(np.diff(lon))
    # A region across the meridian of Greenwich falls into two pieces.
    if len(lon) > 2 and not (np.diff(order) == 1).all() and steps.max() > 1.5 * np.median(found):
        gap = int(steps.argmax())
        west, east = wrapped[order][gap], wrapped[order][gap + 1]
        return (
            f"longitudes must increase within [0, 360) without a hole; got {ends}, which leaves"
            f" {west:g} to {east:g} out; choose a region on one side of 0 degrees, or the globe"
        )
    return order


def _wrapped(lon: np.ndarray) -> np.ndarray:
    # A float32 coordinate may end at 359.99999 or -1e-6, both 0 within its precision.
    return np.mod(np.round(np.mod(lon, 360), 6), 360)


def _runs(order: np.ndarray) -> list[np.ndarray]:
    """The order in two pieces where it jumps, as that of a rolled globe does."""
    steps = np.diff(order)
    usual = np.median(steps) if len(steps) else 1
    return np.split(order, np.flatnonzero(steps != usual) + 1)


def _fitting(size: int, patch_size: int, one_more: bool) -> int:
    rest = size % patch_size
    return size if rest == 0 or (one_more and rest == 1 < size) else size - rest


def _middle(order: np.ndarray, size: int) -> np.ndarray:
    first = (len(order) - size) // 2
    return order[first : first + size]


def _size_message(sizes: list[int], keep: list[int], patch_size: int) -> str:
    low_h, low_w = (size // patch_size * patch_size for size in sizes)
    heights = [h for h in (low_h, low_h + 1, low_h + patch_size) if h >= patch_size]
    widths = [w for w in (low_w, low_w + patch_size) if w >= patch_size]
    advice = (
        "read a larger region"
        if 0 in keep
        else f"set options.crop = true to cut it to {keep[0]} x {keep[1]}"
    )
    return (
        f"the height must be a multiple of {patch_size}, or one more"
        f" ({', '.join(map(str, heights))}), the width a multiple"
        f" ({', '.join(map(str, widths))}); got {sizes[0]} x {sizes[1]}; {advice}"
    )
