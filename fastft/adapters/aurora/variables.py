"""Which variables a run has, and their statistics.

aurora keeps statistics in two dicts of its module `normalisation`. Those of surface and static
variables can be given to a model instead; those of atmospheric variables cannot, and are looked up
there by variable and level: 'w_500'.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from aurora import normalisation
from aurora.normalisation import level_to_str

from fastft.errors import ConfigError, nearest

# Before any run adds its own, so that one run does not see the statistics of another.
_KNOWN = {
    name: (float(location), float(normalisation.scales[name]))
    for name, location in normalisation.locations.items()
    if name in normalisation.scales
}
# Fields of a batch, beside which targets stand under their variables' names.
_RESERVED = ("surf", "atmos", "static", "lat", "lon", "time", "levels")


class Statistics(NamedTuple):
    """A normalised value is (value - location) / scale."""

    location: float
    scale: float


@dataclass(frozen=True)
class Variables:
    """The variables of a run, in the model's order.

    Attributes:
        surf, static, atmos: names.
        new: 'surf_vars', 'static_vars', 'atmos_vars' -> those that the class has not by default.
        given: surface and static variables whose statistics are the run file's.
        statistics: of surface and static variables.
        levels: atmospheric variable -> level as aurora writes it ('500') -> statistics.
    """

    surf: tuple[str, ...]
    static: tuple[str, ...]
    atmos: tuple[str, ...]
    new: Mapping[str, frozenset[str]]
    given: Mapping[str, Statistics]
    statistics: Mapping[str, Statistics]
    levels: Mapping[str, Mapping[str, Statistics]]

    def locations(self) -> Mapping[str, tuple[float, float]]:
        """Statistics of all that varies in time: by surface variable, or as 't_500'."""
        levels = {
            f"{name}_{level}": pair
            for name, heights in self.levels.items()
            for level, pair in heights.items()
        }
        return {name: self.statistics[name] for name in self.surf} | levels

    def location(self, name: str, levels: Sequence[int]) -> float | list[list[list[float]]]:
        """Of a surface variable, or of an atmospheric one as `[C, 1, 1]`."""
        if name in self.surf:
            return self.statistics[name].location
        statistics = self.levels[name]
        return [[[statistics[level_to_str(level)].location]] for level in levels]

    def register(self) -> None:
        """Makes the atmospheric statistics known to aurora, in this process; may be repeated.

        Raises:
            ConfigError: aurora has others, which all models in this process share.
        """
        problems = []
        added = {}
        for variable, levels in self.levels.items():
            for level, wanted in levels.items():
                name = f"{variable}_{level}"
                if name in normalisation.locations:
                    present = (normalisation.locations[name], normalisation.scales[name])
                    if present != wanted:
                        problems.append(
                            f"model.options.atmos_vars.{variable}: statistics at {level} hPa must"
                            f" be aurora's, since all models in a process share them:"
                            f" location {present[0]:g}, scale {present[1]:g}; got location"
                            f" {wanted.location:g}, scale {wanted.scale:g}; leave them out, or"
                            " give the variable another name"
                        )
                else:
                    added[name] = wanted
        if problems:
            raise ConfigError(problems)
        for name, (location, scale) in added.items():
            normalisation.locations[name] = location
            normalisation.scales[name] = scale


def resolve_variables(
    defaults: Mapping[str, Sequence[str]], options: Mapping[str, Any], levels: Sequence[int]
) -> Variables:
    """The run's variables.

    Args:
        defaults: 'surf_vars', 'static_vars', 'atmos_vars' -> the class's names.
        options: the same keys -> None, names, or a table, as in `[model.options]`.
        levels: in hPa, of the run's data.

    Raises:
        ConfigError: with every problem: names without statistics, or statistics that are none.
    """
    problems: list[str] = []
    if len(set(levels)) < len(levels):
        problems.append(
            f"model.options.levels: must hold each level once; got {list(levels)}; drop one"
        )
    names: dict[str, tuple[str, ...]] = {}
    tables: dict[str, Mapping[str, Any]] = {}
    for key, usual in defaults.items():
        names[key], tables[key] = _names(key, usual, options.get(key), problems)
    given = {
        name: found
        for key in ("surf_vars", "static_vars")
        for name, table in tables[key].items()
        if table != {} and (found := _statistics(f"{key}.{name}", table, problems))
    }
    statistics = {}
    for key in ("surf_vars", "static_vars"):
        for name in names[key]:
            if name in given:
                statistics[name] = given[name]
            elif name in _KNOWN:
                statistics[name] = Statistics(*_KNOWN[name])
            elif not tables[key].get(name):
                problems.append(_unknown(key, name, _KNOWN))
    heights = [level_to_str(level) for level in levels]
    by_level = _levels(names["atmos_vars"], tables["atmos_vars"], heights, problems)
    twice = set(names["surf_vars"]) & {*names["static_vars"], *names["atmos_vars"]}
    problems += [
        f"model.options.surf_vars: '{name}' must be of one kind; got it in another too; rename one"
        for name in sorted(twice)
    ]
    if problems:
        raise ConfigError(problems)
    new = {key: frozenset(names[key]) - set(usual) for key, usual in defaults.items()}
    return Variables(
        surf=names["surf_vars"],
        static=names["static_vars"],
        atmos=names["atmos_vars"],
        new=MappingProxyType(new),
        given=MappingProxyType(given),
        statistics=MappingProxyType(statistics),
        levels=MappingProxyType(by_level),
    )


def _names(
    key: str, usual: Sequence[str], option: Any, problems: list[str]
) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The names of one kind, and the table of those that have one."""
    where = f"model.options.{key}"
    match option:
        case None:
            return tuple(usual), {}
        case Mapping():
            names, table = tuple(dict.fromkeys([*usual, *option])), option
        case _:
            names, table = tuple(option), {}
            if not names:
                problems.append(f"{where}: must name at least one variable; got none; add one")
    # A dot would split the name of a tensor.
    bad = [n for n in names if not isinstance(n, str) or not n or "." in n or n in _RESERVED]
    problems += [
        f"{where}: names must be text without dots, and none of {', '.join(_RESERVED)}; got {n!r};"
        " rename it"
        for n in bad
    ]
    names = tuple(n for n in names if n not in bad)
    if len(set(names)) < len(names):
        problems.append(f"{where}: must name each variable once; got {list(names)}; drop one")
    return names, table


def _levels(
    names: Sequence[str],
    tables: Mapping[str, Any],
    wanted: Sequence[str],
    problems: list[str],
) -> dict[str, dict[str, Statistics]]:
    """Atmospheric statistics by variable and level, for the wanted levels."""
    found: dict[str, dict[str, Statistics]] = {}
    for name in names:
        known = {level: f"{name}_{level}" for level in wanted if f"{name}_{level}" in _KNOWN}
        found[name] = {level: Statistics(*_KNOWN[full]) for level, full in known.items()}
        table = tables.get(name, {})
        where = f"atmos_vars.{name}"
        before = len(problems)
        if isinstance(table, Mapping) and not {"location", "scale"} & set(table):
            for text, entry in table.items():
                level = _level(f"{where}.{text}", text, wanted, problems)
                statistics = _statistics(f"{where}.{text}", entry, problems)
                if level and statistics:
                    found[name][level] = statistics
        elif statistics := _statistics(where, table, problems):
            found[name] = dict.fromkeys(wanted, statistics)
        absent = [level for level in wanted if level not in found[name]]
        if not found[name] and len(problems) == before:
            variables = {n.rpartition("_")[0] for n in _KNOWN if n.endswith("_500")}
            problems.append(_unknown("atmos_vars", name, variables))
        elif absent and len(problems) == before:
            problems.append(
                f"model.options.{where}: must have statistics at every level of"
                f" model.options.levels; got none at {', '.join(absent)} hPa; add"
                f' "{absent[0]}" = {{ location = 0.0, scale = 1.0 }}, or drop the level'
            )
    return found


def _level(where: str, text: str, wanted: Sequence[str], problems: list[str]) -> str | None:
    if text in wanted:
        return text
    problems.append(
        f"model.options.{where}: must be a level of model.options.levels, or 'location' and"
        f" 'scale'; got '{text}'; choose from {', '.join(wanted)}"
    )
    return None


def _statistics(where: str, table: Any, problems: list[str]) -> Statistics | None:
    """`{ location = ..., scale = ... }` as statistics; None, and noted, where it is none."""
    values = table if isinstance(table, Mapping) else {}
    numbers = [v for v in values.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    fits = set(values) == {"location", "scale"} and len(numbers) == 2
    if fits and math.isfinite(values["location"]) and 0 < values["scale"] < math.inf:
        return Statistics(float(values["location"]), float(values["scale"]))
    problems.append(
        f"model.options.{where}: must be {{ location = number, scale = number above 0 }};"
        f" got {table if values == {} else dict(values)}; correct it"
    )
    return None


def _unknown(key: str, name: str, known: Any) -> str:
    return (
        f"model.options.{key}: '{name}' must have statistics, and aurora knows none; got a name"
        f" alone{nearest(name, sorted(known))}; else give location and scale:"
        f" {key}.{name} = {{ location = 0.0, scale = 1.0 }}{_from_data(key, name)}"
    )


def _from_data(key: str, name: str) -> str:
    if key == "static_vars":
        return ""
    return f"; with {key}.{name} = {{}}, `fastft stats` prints those of the data"
