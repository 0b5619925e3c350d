"""Run files: TOML and `section.key=value` overrides -> `RunConfig`, and back.

The only parser of text. Relative paths in a run file are relative to the folder that fastft is
started in.
"""

import dataclasses
import json
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fastft.config import RunConfig
from fastft.errors import ConfigError, nearest

Parsed = TypeVar("Parsed")


def read_run_file(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a run file and applies overrides such as `optim.lr=1e-4`.

    Raises:
        ConfigError: with every problem found, each as `file: key: what is wrong; what to do`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be a readable TOML file; got {error}") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: must be valid TOML; {error}") from None
    for override in overrides:
        _apply(tree, override)
    return parse(RunConfig, tree, where=str(path))


def parse(kind: type[Parsed], tree: Mapping[str, Any], *, where: str, key: str = "") -> Parsed:
    """Checks a parsed TOML tree against a dataclass.

    Args:
        kind: pydantic dataclass.
        tree: what tomllib returned.
        where: file name, for messages.
        key: where in the file the tree stands, for messages.
    """
    # Strict JSON mode: arrays become tuples and strings paths, everything else must fit as it is.
    text = json.dumps(tree, default=_refuse_date)
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        errors = [e for e in error.errors() if e["type"] != "too_short" or e["input"] == []]
        raise ConfigError(_message(kind, e, where, key) for e in errors) from None


def to_tree(config: RunConfig) -> dict[str, Any]:
    """The run file as a tree of tables, arrays and values, every default spelt out."""
    return _without_none(json.loads(TypeAdapter(RunConfig).dump_json(config)))


def format_run_file(config: RunConfig) -> str:
    """The run file that reads back as `config`."""
    return tomli_w.dumps(to_tree(config))


def schema() -> dict[str, Any]:
    """The JSON Schema of a run file."""
    return TypeAdapter(RunConfig).json_schema()


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets one `a.b.0.c=value` in the tree; the value is TOML, or a string where it is not."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override '{override}': must read section.key=value, as optim.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                at = ".".join(parts[:depth])
                raise ConfigError(
                    f"override '{override}': '{at}' has entries 0 to {len(node) - 1}; got '{part}'"
                )
            index: Any = int(part)
        else:
            index = part
        if last:
            node[index] = value
        else:
            node = node[index] if isinstance(node, list) else node.setdefault(index, {})
            if not isinstance(node, (dict, list)):
                at = ".".join(parts[: depth + 1])
                raise ConfigError(f"override '{override}': '{at}' is a value, not a section")


def _refuse_date(value: object) -> str:
    """Dates have no JSON form; adapters take them as ISO 8601 text."""
    return str(value)


def _message(kind: type, error: ErrorDetails, where: str, key: str) -> str:
    path, names = _locate(kind, error["loc"])
    at = ".".join(part for part in [key, *path] if part)
    got = json.dumps(error["input"], default=str)
    got = got if len(got) <= 60 else got[:57] + "..."
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"{where}: {at}: unknown key{nearest(path[-1], sorted(names))}"
        case "too_short":
            return f"{where}: {at}: must hold at least one entry; got none; add one"
        case "missing" | "missing_argument":
            return f"{where}: {at}: must be set; got nothing; add it"
        case "union_tag_not_found":
            return f"{where}: {at}: needs a name; got {got}; set its 'name'"
        case "union_tag_invalid" | "literal_error":
            context = error.get("ctx", {})
            allowed = context.get("expected_tags") or context.get("expected", "")
            value = str(context.get("tag", error["input"]))
            hint = nearest(value, re.findall("'(.*?)'", allowed))
            return f"{where}: {at}: must be a known value; got '{value}'{hint}"
    text = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: {at}: must be {text}; got {got}"


def _locate(kind: Any, loc: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """A key as the user wrote it, and the names allowed beside it.

    pydantic puts the tag of a tagged union into the location; it is left out of the key.
    """
    path: list[str] = []
    names: list[str] = []
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
        elif kind is not None:
            arguments = [a for a in get_args(kind) if a is not Ellipsis]
            kind = arguments[-1] if arguments else None
            names = []
    return path, names


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
