"""Maps of target, prediction and error."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#222222"
# Of Aurora's own variables; others have none here.
UNITS = {
    **dict.fromkeys(("2t", "2d", "t", "skt", "stl1"), "K"),
    **dict.fromkeys(
        ("10u", "10v", "100u", "100v", "u", "v", "wind", "10u_wave", "10v_wave"), "m/s"
    ),
    **{"msl": "Pa", "sp": "Pa", "z": "m²/s²", "q": "kg/kg"},
    **dict.fromkeys(("swh", "shww", "shts", "swh1", "swh2"), "m"),
    **dict.fromkeys(("mwp", "pp1d", "mpww", "mpts", "mwp1", "mwp2"), "s"),
    **dict.fromkeys(("mwd", "mdww", "mdts", "mwd1", "mwd2"), "°"),
    **dict.fromkeys(("pm1", "pm2p5", "pm10"), "kg/m³"),
    **dict.fromkeys(("tcco", "tc_no", "tcno2", "gtco3", "tcso2", "tcwv"), "kg/m²"),
    **dict.fromkeys(("co", "no", "no2", "go3", "so2"), "kg/kg"),
}
# Beyond these percentiles colours do not change: single cells would take up the whole scale.
_LOWEST, _HIGHEST = 0.2, 99.8


@dataclass(frozen=True)
class Map:
    """One variable at one level and lead time.

    Attributes:
        level: in hPa; None of surface variables.
        unit: empty where it is not known.
        valid: seconds since 1970, the time that is predicted.
        target, prediction, error: `[H, W]`.
        lat: `[H]`, decreasing; `lon`: `[W]`, increasing.
        land: `[H, W]`, its share, for the coasts; None where the data have none.
        rmse: latitude-weighted, of this map.
    """

    variable: str
    level: int | None
    unit: str
    lead_hours: float
    valid: int
    target: np.ndarray
    prediction: np.ndarray
    error: np.ndarray
    lat: np.ndarray
    lon: np.ndarray
    land: np.ndarray | None
    rmse: float

    @property
    def title(self) -> str:
        """Variable, level, unit, lead time and valid time."""
        level = "" if self.level is None else f" at {self.level} hPa"
        time = datetime.fromtimestamp(self.valid, UTC)
        return (
            f"{self.variable}{level}, {self.unit or 'in the unit of the data'}:"
            f" {self.lead_hours:g} h ahead, valid {time:%Y-%m-%d %H:%M} UTC"
        )


def draw_map(shown: Map) -> "Figure":
    """Target and prediction in one colour scale, and prediction - target.

    The scale of the error is symmetric around 0.
    """
    # Not pyplot, which keeps a global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if shown.unit == "°":
        # Directions, whose colours close the circle; those of "twilight" come near the missing's.
        low, high, colours = 0.0, 360.0, "hsv"
    else:
        low, high = _limits(np.concatenate([shown.target.ravel(), shown.prediction.ravel()]))
        colours = "viridis"
    sizes = np.abs(shown.error[np.isfinite(shown.error)])
    most = float(np.percentile(sizes, _HIGHEST)) if sizes.any() else 1.0
    width, height = _panel(shown.lat, shown.lon)
    figure = Figure(figsize=(3 * width + 1.8, height + 1.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    target, prediction, difference = figure.subplots(1, 3, sharex=True, sharey=True)
    image = _draw(target, shown, shown.target, "target", low, high, colours)
    _draw(prediction, shown, shown.prediction, "prediction", low, high, colours)
    _explain(figure, image, [target, prediction], shown.unit)
    rmse = f"prediction − target, RMSE {shown.rmse:.3g}"
    image = _draw(difference, shown, shown.error, rmse, -most, most, "RdBu_r")
    _explain(figure, image, [difference], shown.unit)
    target.set_ylabel("latitude, °", color=_INK)
    figure.suptitle(shown.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    return figure


def _explain(figure: Any, image: Any, axes: list[Any], unit: str) -> None:
    """A colour bar below."""
    shape = {"orientation": "horizontal", "shrink": 0.9 / len(axes) ** 0.5, "aspect": 40}
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.02, **shape)
    bar.locator.set_params(nbins=6)
    bar.formatter.set_powerlimits((-2, 5))
    bar.ax.tick_params(colors=_INK, labelsize=8)
    bar.set_label(unit, color=_INK)


def _draw(
    axes: Any, shown: Map, values: np.ndarray, title: str, low: float, high: float, colours: str
) -> Any:
    lat, lon = _edges(shown.lat), _edges(shown.lon)
    axes.set_facecolor("#cccccc")  # What is missing.
    masked = np.ma.masked_invalid(values)
    image = axes.pcolorfast(lon, lat, masked, cmap=colours, vmin=low, vmax=high)
    if shown.land is not None and shown.land.min() < 0.5 <= shown.land.max():
        axes.contour(shown.lon, shown.lat, shown.land, [0.5], colors=_INK, linewidths=0.5)
    axes.set_aspect(_stretch(shown.lat))
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("longitude, °", color=_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    return image


def _limits(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, [_LOWEST, _HIGHEST])
    return (float(low), float(high)) if high > low else (float(low) - 1, float(high) + 1)


def _edges(centres: np.ndarray) -> np.ndarray:
    """`[N + 1]` of `[N]`, half-way between neighbours."""
    centres = centres.astype(np.float64)
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _stretch(lat: np.ndarray) -> float:
    """How much longer a degree of latitude is; 1 for maps that reach over most of the globe."""
    return 1.0 if np.ptp(lat) > 90 else float(1 / np.cos(np.deg2rad(lat.mean())))


def _panel(lat: np.ndarray, lon: np.ndarray) -> tuple[float, float]:
    """Inches of one map."""
    ratio = float(np.ptp(lat) * _stretch(lat) / max(np.ptp(lon), 1e-9))
    width = min(5.0, max(2.8, 3.6 / np.sqrt(max(ratio, 1e-3))))
    return width, min(9.0, max(1.2, width * ratio))
