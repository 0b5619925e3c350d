"""Run files: TOML and `section.key=value` overrides -> `RunConfig`, and back.

The only parser of text. Relative paths in a run file are relative to the folder that fastft is
started in.
"""

import dataclasses
import json
import re
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fastft.config import RunConfig
from fastft.errors import ConfigError, nearest

Parsed = TypeVar("Parsed")


# `[model]`, `[finetune]`, name -> the part of `[optim]` that a preset of the adapter stands for.
Presets = Callable[[Mapping[str, Any], Mapping[str, Any], str], Mapping[str, Any]]


def read_run_file(
    path: Path, overrides: Iterable[str] = (), presets: Presets | None = None
) -> RunConfig:
    """Reads a run file and applies overrides such as `optim.lr=1e-4`.

    Args:
        presets: the adapters'. `optim.preset` is replaced by what it stands for.

    Raises:
        ConfigError: with every problem found, each as `file: key: what is wrong; what to do`.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: must be a readable file; got {error.strerror}; check the path"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: must be TOML; got an error: {error}; correct it") from None
    problems = [problem for override in overrides for problem in _apply(tree, override)]
    try:
        if presets is not None:
            _fill_in_preset(tree, presets, where=str(path))
        config = parse(RunConfig, tree, where=str(path))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def parse(kind: type[Parsed], tree: Mapping[str, Any], *, where: str = "", key: str = "") -> Parsed:
    """Checks a parsed TOML tree against a dataclass.

    Args:
        kind: pydantic dataclass.
        tree: what tomllib returned.
        where: file name, for messages; empty: the key says all.
        key: where in the file the tree stands, for messages.
    """
    # Strict JSON mode: arrays become tuples and strings paths, everything else must fit as it is.
    text = json.dumps(tree, default=_refuse_date)
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        errors = [e for e in error.errors() if e["type"] != "too_short" or e["input"] == []]
        prefix = f"{where}: " if where else ""
        raise ConfigError(prefix + _message(kind, e, key) for e in errors) from None


def to_tree(config: RunConfig) -> dict[str, Any]:
    """The run file as a tree of tables, arrays and values, every default spelt out."""
    return _without_none(json.loads(TypeAdapter(RunConfig).dump_json(config)))


def format_run_file(config: RunConfig) -> str:
    """The run file that reads back as `config`."""
    return tomli_w.dumps(to_tree(config))


def schema() -> dict[str, Any]:
    """The JSON Schema of a run file."""
    return TypeAdapter(RunConfig).json_schema()


def _apply(tree: dict[str, Any], override: str) -> Iterator[str]:
    """Sets one `a.b.0.c=value` in the tree, or yields why not.

    The value is TOML, or a string where it is not.
    """
    where = f"override '{override}'"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        yield f"{where}: must read section.key=value, as optim.lr=1e-4"
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        value = text.strip()
        if value.startswith(("[", "{")):
            yield (
                f"{where}: must be TOML after '='; got an error: {error}; put the whole override"
                " into single quotes, so that the shell leaves double quotes in it"
            )
            return
    node: Any = tree
    for depth, part in enumerate(parts):
        at = ".".join(parts[:depth])
        if not isinstance(node, (dict, list)):
            yield f"{where}: '{at}' must be a section; got the value {json.dumps(node)}"
            return
        if isinstance(node, list) and not (part.isdecimal() and int(part) < len(node)):
            has = f"'{at}' has the entries 0 to {len(node) - 1}" if node else f"'{at}' is empty"
            yield f"{where}: must name an entry that exists, {has}; got '{part}'"
            return
        index: Any = int(part) if isinstance(node, list) else part
        if depth == len(parts) - 1:
            node[index] = value
        else:
            node = node[index] if isinstance(node, list) else node.setdefault(index, {})


def _fill_in_preset(tree: dict[str, Any], presets: Presets, where: str) -> None:
    """Puts what `optim.preset` stands for under the settings of `[optim]`."""
    optim = tree.get("optim")
    if not (isinstance(optim, dict) and isinstance(optim.get("preset"), str)):
        return
    model, finetune = (
        found if isinstance(found := tree.get(section, {}), dict) else {}
        for section in ("model", "finetune")
    )
    try:
        preset = presets(model, finetune, optim.pop("preset"))
    except ConfigError as error:
        raise ConfigError(f"{where}: {problem}" for problem in error.problems) from None
    tree["optim"] = _above(optim, preset)


def _above(own: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**preset, **own}
    for key in own.keys() & preset.keys():
        if isinstance(own[key], dict) and isinstance(preset[key], dict):
            merged[key] = _above(own[key], preset[key])
    return merged


def _refuse_date(value: object) -> str:
    """Dates have no JSON form; adapters take them as ISO 8601 text."""
    return str(value)


def _message(kind: type, error: ErrorDetails, key: str) -> str:
    path, names, description = _locate(kind, error["loc"])
    at = ".".join(part for part in [key, *path] if part)
    got = json.dumps(error["input"], default=str)
    got = got if len(got) <= 60 else got[:57] + "..."
    match error["type"]:
        case "value_error":
            # Of a dataclass as a whole, in our own words.
            text = error["msg"].removeprefix("Value error, ")
            return f"{at}: {text}" if at else text
        case "unexpected_keyword_argument":
            return f"{at}: unknown key{nearest(path[-1], sorted(names))}"
        case "too_short":
            return f"{at}: must hold at least one entry; got none; add one"
        case "missing" | "missing_argument":
            return f"{at}: must be set; got nothing; add it"
        case "union_tag_not_found":
            return f"{at}: needs a name; got {got}; set its 'name'"
        case "union_tag_invalid" | "literal_error":
            context = error.get("ctx", {})
            allowed = context.get("expected_tags") or context.get("expected", "")
            at = f"{at}.name" if "tag" in context else at
            value = str(context.get("tag", error["input"]))
            hint = nearest(value, re.findall("'(.*?)'", allowed))
            return f"{at}: must be a known value; got '{value}'{hint}"
        case "string_pattern_mismatch":
            return f"{at}: must be {description.rstrip('.')}; got {got}"
    text = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{at}: must be {_TOML_NAMES.get(text, text)}; got {got}"


# pydantic's words -> TOML's.
_TOML_NAMES = {
    "an object": "a table",
    "a valid array": "an array",
    "a valid boolean": "true or false",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "text in quotes",
}


def _locate(kind: Any, loc: Sequence[int | str]) -> tuple[list[str], list[str], str]:
    """A key as the user wrote it, the names allowed beside it, and its description.

    pydantic puts the tag of a tagged union into the location; it is left out of the key.
    """
    path: list[str] = []
    names: list[str] = []
    description = ""
    for part in loc:
        options = _members(kind)
        tagged = [option for option in options if _tag(option) == part]
        if tagged:
            kind = tagged[0]
            continue
        path.append(str(part))
        kind = next((o for o in options if dataclasses.is_dataclass(o) or get_origin(o)), None)
        if dataclasses.is_dataclass(kind):
            names = [field.name for field in dataclasses.fields(kind)]
            hints = get_type_hints(kind, include_extras=True)
            kind = hints.get(str(part))
            notes = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
            description = next((n.description for n in notes if isinstance(n, FieldInfo)), "")
        elif kind is not None:
            arguments = [a for a in get_args(kind) if a is not Ellipsis]
            kind = arguments[-1] if arguments else None
            names = []
    return path, names, description or ""


def _members(kind: Any) -> list[Any]:
    """The alternatives of a type, without Annotated and None."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [m for argument in get_args(kind) for m in _members(argument) if m is not type(None)]
    return [kind]


def _tag(kind: Any) -> str | None:
    """The `name` that picks this dataclass in a tagged union."""
    if not dataclasses.is_dataclass(kind):
        return None
    default = next((f.default for f in dataclasses.fields(kind) if f.name == "name"), None)
    return default if isinstance(default, str) else None


def _without_none(tree: Any) -> Any:
    """TOML has no null: keys that hold one are left out."""
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list):
        return [_without_none(value) for value in tree]
    return tree
