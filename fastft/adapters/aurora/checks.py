"""Data checks for weather: units, gaps, missing values, levels, grids.

All look at one pass over the samples, which `weather_checks` shares between them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aurora import normalisation

from fastft.adapters.aurora.stats import Moments
from fastft.task import CheckData, DataCheck, Finding

# Variable, or variable and level ('t_500') -> location and scale.
Locations = Mapping[str, tuple[float, float]]

# A mean farther from the location than this many scales is another quantity or unit.
FAR = 5.0
# How units that are often met become Aurora's: name of both, factor, offset.
_TEMPERATURE = (
    ("degrees Celsius", "kelvin", 1.0, 273.15),
    ("degrees Fahrenheit", "kelvin", 5 / 9, 459.67 * 5 / 9),
)
_PRESSURE = (("hPa", "Pa", 100.0, 0.0), ("kPa", "Pa", 1000.0, 0.0))
_GEOPOTENTIAL = (
    ("geopotential height in metres", "geopotential in m2 s-2", 9.80665, 0.0),
    ("geopotential height in decametres", "geopotential in m2 s-2", 98.0665, 0.0),
)
_HUMIDITY = (("g/kg", "kg/kg", 1e-3, 0.0),)
UNITS = {
    **dict.fromkeys(("2t", "2d", "t", "skt", "stl1"), _TEMPERATURE),
    **dict.fromkeys(("msl", "sp"), _PRESSURE),
    "z": _GEOPOTENTIAL,
    "q": _HUMIDITY,
}


@dataclass
class Content:
    """One surface or atmospheric variable of one data set.

    Attributes:
        levels: of its channels; None: a surface variable.
        moments: of the last history steps.
        values, bad, bad_sea, bad_land: of all steps: numbers, and those that are not finite; of a
            masked variable those that are infinite.
        missing: of a masked variable, NaN.
        flat: samples in which a channel is one value, with the first.
        first_bad: sample with the first number that is not finite.
    """

    levels: list[int] | None
    moments: Moments
    values: int = 0
    bad: int = 0
    bad_sea: int = 0
    bad_land: int = 0
    missing: int = 0
    flat: list[int] = field(default_factory=list)
    first_bad: int = -1


@dataclass
class Survey:
    """What one pass over a data set gathered.

    Attributes:
        samples: number of them.
        variables: by name.
        static: the fields of the first sample, `[H, W]`.
        grid: what is wrong with latitudes or longitudes, in the first such sample.
        origin: see `data.Origin`; None where samples come from elsewhere.
    """

    where: str
    samples: int = 0
    variables: dict[str, Content] = field(default_factory=dict)
    static: dict[str, np.ndarray] = field(default_factory=dict)
    grid: str = ""
    origin: Any = None

    def channels(self, locations: Locations) -> Iterator[tuple[str, str, Content, int, Any]]:
        """Yields variable, where, content, channel, and (location, scale) or None."""
        for name, content in self.variables.items():
            for c, level in enumerate(content.levels or [None]):
                full = name if level is None else f"{name}_{level}"
                where = f"{self.where}: {name}" + ("" if level is None else f" at {level} hPa")
                yield name, where, content, c, locations.get(full)


def weather_checks(
    statistics: Locations | None = None, masked: Sequence[str] = ()
) -> tuple[DataCheck, ...]:
    """The checks, which read the samples once between them.

    Args:
        statistics: that the model normalises with, by variable or variable and level ('t_500');
            where there is none, aurora's count.
        masked: variables whose missing values the model takes as such.
    """
    last: list[tuple[CheckData, list[Survey]]] = []

    def surveys(data: CheckData) -> list[Survey]:
        if not last or last[0][0] is not data:
            last[:] = [(data, survey(data, masked))]
        return last[0][1]

    def bind(check: "_Check") -> DataCheck:
        @functools.wraps(check)
        def bound(data: CheckData) -> Iterator[Finding]:
            locations = aurora_locations() | dict(statistics or {})
            for found in surveys(data):
                yield from check(found, locations)

        return bound

    return tuple(bind(check) for check in WEATHER_CHECKS)


def aurora_locations() -> dict[str, tuple[float, float]]:
    """aurora's own statistics."""
    scales = normalisation.scales
    return {n: (loc, scales[n]) for n, loc in normalisation.locations.items() if n in scales}


def survey(data: CheckData, masked: Sequence[str] = ()) -> list[Survey]:
    """Reads all samples of all data sets."""
    surveys = []
    for name, split, samples in data.sources:
        found = Survey(f"{name} ({split})")
        for index, sample in enumerate(samples):
            _add(found, index, sample, masked)
        surveys.append(found)
    return surveys


def _add(found: Survey, index: int, sample: Mapping[str, Any], masked: Sequence[str]) -> None:
    found.samples += 1
    found.origin = found.origin or sample.get("origin")
    found.static = found.static or {n: np.asarray(v) for n, v in sample["static"].items()}
    found.grid = found.grid or _grid_problem(np.asarray(sample["lat"]), np.asarray(sample["lon"]))
    mask = found.static.get("lsm")
    levels = [int(level) for level in sample["levels"]]
    for kind, target in (("surf", "target_surf"), ("atmos", "target_atmos")):
        for name, values in sample[target].items():
            # Some classes predict variables that they do not take.
            past = [sample[kind][name]] if name in sample[kind] else []
            steps = [np.asarray(array) for array in (*past, values)]
            if name not in found.variables:
                own = levels if kind == "atmos" else None
                found.variables[name] = Content(own, Moments(len(levels) if own else 1))
            content = found.variables[name]
            now = steps[0][-1] if kind == "atmos" else steps[0][-1:]
            content.moments.add(now)
            flat = now.reshape(len(now), -1)
            if (flat == flat[:, :1]).all(axis=1).any():
                content.flat.append(index)
            for array in steps:
                content.values += array.size
                bad = np.isinf(array) if name in masked else ~np.isfinite(array)
                content.missing += int(np.isnan(array).sum()) if name in masked else 0
                if not bad.any():
                    continue
                content.first_bad = index if content.first_bad < 0 else content.first_bad
                content.bad += int(bad.sum())
                if mask is not None and mask.shape == bad.shape[-2:]:
                    content.bad_sea += int((bad & (mask < 0.5)).sum())
                    content.bad_land += int((bad & (mask >= 0.5)).sum())


def _grid_problem(lat: np.ndarray, lon: np.ndarray) -> str:
    problems = []
    if not ((np.diff(lat) < 0).all() and (np.abs(lat) <= 90).all()):
        problems.append(f"latitudes from {lat.flat[0]:g} to {lat.flat[-1]:g}")
    if not ((np.diff(lon) > 0).all() and (lon >= 0).all() and (lon < 360).all()):
        problems.append(f"longitudes from {lon.flat[0]:g} to {lon.flat[-1]:g}")
    return " and ".join(problems)


def weather_units(found: Survey, locations: Locations) -> Iterator[Finding]:
    """Means that only make sense in another unit."""
    # The means of another level look like another unit's: humidity's of the ground, higher up.
    swapped = any(level_order(found, locations))
    for name, content in found.variables.items():
        if swapped and content.levels is not None:
            continue
        if unit := likely_unit(found, name, locations):
            given, wanted, factor, offset = unit
            mean = content.moments.mean[0]
            level = "" if content.levels is None else f" at {content.levels[0]} hPa"
            change = f"multiply by {factor:g}" if factor != 1 else ""
            change += " and " if change and offset else ""
            change += f"add {offset:.6g}" if offset else ""
            yield Finding(
                check="weather-units",
                severity="error",
                where=f"{found.where}: {name}",
                what=f"must be {wanted}; got what looks like {given}",
                count=found.samples,
                example=f"the mean{level} is {mean:.5g}",
                advice=f"{change} in the files",
            )


def likely_unit(
    found: Survey, name: str, locations: Locations
) -> tuple[str, str, float, float] | None:
    """The unit that a variable seems to have instead of Aurora's."""
    rows = [(m.moments.mean[c], s) for n, _, m, c, s in found.channels(locations) if n == name]
    known = np.array([(m, *s) for m, s in rows if s is not None and np.isfinite(m)])
    if not known.size:
        return None
    mean, location, scale = known.T

    def distance(factor: float, offset: float) -> float:
        return float((np.abs(mean * factor + offset - location) / scale).max())

    if distance(1, 0) <= FAR:
        return None
    for unit in UNITS.get(name, ()):
        # 3: in Fahrenheit, taken for Celsius, a temperate mean would be hotter than any desert.
        if distance(*unit[2:]) <= (3.0 if unit[0] == "degrees Celsius" else FAR):
            return unit
    return None


def missing_hours(found: Survey, locations: Locations) -> Iterator[Finding]:
    """Times that are not in the files, and what that costs."""
    origin = found.origin
    if origin is not None and origin.missing:
        what = f"times should be complete; got {origin.missing} of {origin.times} missing"
        what += (
            f" ({origin.missing / origin.times:.1%}), which leaves {origin.left_out} samples out"
        )
        example = f"the first is {origin.first_gap}"
        advice = "download them, or go on without"
        yield Finding(
            "missing-hours", "warning", found.where, what, origin.missing, example, advice
        )


def missing_values(found: Survey, locations: Locations) -> Iterator[Finding]:
    """NaN and infinite values, which make the loss NaN."""
    for name, content in found.variables.items():
        if content.missing and content.missing == content.values:
            yield Finding(
                check="missing-values",
                severity="error",
                where=f"{found.where}: {name}",
                what="a masked variable must have values somewhere; got NaN alone",
                count=content.missing,
                example=f"{found.samples} samples",
                advice="check the file, or leave the variable out",
            )
        if not content.bad:
            continue
        place = ""
        if content.bad_sea and not content.bad_land:
            place = ", all over sea"
        elif content.bad_land and not content.bad_sea:
            place = ", all over land"
        share = content.bad / content.values
        yield Finding(
            check="missing-values",
            severity="error",
            where=f"{found.where}: {name}",
            what=f"values must be finite; got {content.bad} NaN or infinite ones"
            f" ({share:.2%}{place})",
            count=content.bad,
            example=f"sample {content.first_bad}",
            advice="name the variable in model.options.masked, so that they do not count, or fill"
            " them"
            if place
            else "repair the files, or leave these times out with options.start and options.end",
        )
    for name, values in found.static.items():
        if bad := int((~np.isfinite(values)).sum()):
            where = f"{found.where}: {name} (static)"
            what = (
                f"values must be finite; got {bad} NaN or infinite ones ({bad / values.size:.2%})"
            )
            first = np.argwhere(~np.isfinite(values))[0].tolist()
            example = f"row {first[0]}, column {first[1]}"
            yield Finding("missing-values", "error", where, what, bad, example, "fill them")


def level_order(found: Survey, locations: Locations) -> Iterator[Finding]:
    """Levels that are not where they should be, by the physics of the mean profile."""
    for name, lowest in (("z", 0), ("t", 300)):
        content = found.variables.get(name)
        if content is None or content.levels is None:
            continue
        # Above 300 hPa, in the stratosphere, temperature rises again.
        order = [c for c in np.argsort(content.levels) if content.levels[c] >= lowest]
        mean = content.moments.mean[order]
        if len(order) < 2 or not content.moments.count[order].all():
            continue
        # Geopotential falls with pressure, level by level; temperature rises from top to bottom,
        # although inversions may turn two levels round.
        wrong = (np.diff(mean) >= 0).any() if name == "z" else mean[-1] <= mean[0]
        if wrong:
            at = [f"{mean[i]:.5g} at {content.levels[order[i]]} hPa" for i in (0, -1)]
            trend = "fall" if name == "z" else "rise"
            reverse = (np.diff(mean) > 0).all() if name == "z" else mean[-1] < mean[0]
            got = "the reverse" if reverse else "another order"
            yield Finding(
                check="level-order",
                severity="error",
                where=f"{found.where}: {name}",
                what=f"means must {trend} with pressure; got {got}",
                count=len(order),
                example=" and ".join(at),
                advice="check that the files' level coordinate is in the order of the values",
            )


def grid_order(found: Survey, locations: Locations) -> Iterator[Finding]:
    """Latitudes and longitudes in another order than Aurora's."""
    must = "latitudes must decrease, longitudes increase within [0, 360)"
    if found.grid:
        what, example = f"{must}; got others", found.grid
        advice = "sort rows and columns, with the values"
        yield Finding("grid-order", "error", found.where, what, found.samples, example, advice)
    origin = found.origin
    if origin is not None and (origin.flipped or origin.rolled):
        (north, south), (west, east) = origin.latitudes, origin.longitudes
        done = [
            text
            for text, so in (("rows flipped", origin.flipped), ("columns reordered", origin.rolled))
            if so
        ]
        what = f"{must}; the files differ, and were read with {' and '.join(done)}"
        example = f"latitudes from {north:g} to {south:g}, longitudes from {west:g} to {east:g}"
        advice = "nothing need be done; predictions are in Aurora's order"
        yield Finding("grid-order", "warning", found.where, what, found.samples, example, advice)


def constant_fields(found: Survey, locations: Locations) -> Iterator[Finding]:
    """Maps that hold one value."""
    for name, content in found.variables.items():
        if content.flat:
            what = f"maps must vary; got {len(content.flat)} of {found.samples} samples with one"
            what += " value throughout"
            where, example = f"{found.where}: {name}", f"sample {content.flat[0]}"
            advice = "check how these times were written; leave the variable out if all are so"
            yield Finding(
                "constant-fields", "warning", where, what, len(content.flat), example, advice
            )
    for name, values in found.static.items():
        if values.size > 1 and (values == values.flat[0]).all():
            where, what = f"{found.where}: {name} (static)", "a map should vary; got one value"
            example, advice = f"{values.flat[0]:g}", "check the file; a region may be so"
            yield Finding("constant-fields", "warning", where, what, 1, example, advice)


def weather_statistics(found: Survey, locations: Locations) -> Iterator[Finding]:
    """Means and deviations far from those that the model normalises with."""
    explained = {n for n in found.variables if likely_unit(found, n, locations)}
    for name, where, content, c, expected in found.channels(locations):
        if expected is None or name in explained or not content.moments.count[c]:
            continue
        location, scale = expected
        if (location, scale) == (0, 1):
            # Not normalised: angles, which the model takes by sine and cosine, and insolation.
            continue
        mean, std = content.moments.mean[c], content.moments.std[c]
        distance = abs(mean - location) / scale
        if max(distance, std / scale) > FAR:
            yield Finding(
                check="weather-statistics",
                severity="warning",
                where=where,
                what=f"mean and deviation must be within {FAR:g} scales of the model's; got a mean"
                f" {distance:.3g} scales away, a deviation of {std / scale:.3g} scales",
                count=found.samples,
                example=f"mean {mean:.5g}, deviation {std:.5g}; the model has {location:.5g} and"
                f" {scale:.5g}",
                advice="check unit and variable; else give the data's own statistics in"
                " model.options",
            )


_Check = Callable[[Survey, Locations], Iterator[Finding]]
WEATHER_CHECKS: tuple[_Check, ...] = (
    weather_units,
    missing_hours,
    missing_values,
    level_order,
    grid_order,
    constant_fields,
    weather_statistics,
)
