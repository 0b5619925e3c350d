"""Filling a model from a checkpoint, with a full account of what matched and what did not."""

import difflib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fastft.checkpoint.heads import start_heads
from fastft.checkpoint.names import matching_prefix
from fastft.checkpoint.read import Weights
from fastft.config import ModelConfig, NewHead
from fastft.errors import CheckpointError
from fastft.names import first_few, is_under, unwrapped

# Counts batches for momentum = None only; BatchNorm had none before torch 0.4.1.
_OPTIONAL = "num_batches_tracked"


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by tensor name in the plain model.

    Attributes:
        path: the file.
        loaded: filled from the checkpoint, tied names included.
        missing: left as initialised: not in the checkpoint.
        unexpected: in the checkpoint only, by the file's names.
        mismatched: left as initialised: other shape or kind of number in the checkpoint.
        new: in new heads, or added to the model, as low-rank updates of its own.
        coverage: share of the model's values outside new heads that were filled, 0 to 1.
        prefix: what was taken off the checkpoint's names.
        added: what was put before them, where the model holds the checkpoint's model inside.
        casts: 'float32 -> bfloat16': how many tensors.
        shapes: name -> its shape, or for mismatched how the two differ.
    """

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    new: tuple[str, ...]
    coverage: float
    prefix: str
    added: str
    casts: Mapping[str, int]
    shapes: Mapping[str, str]

    def table(self, notes: Sequence[str] = ()) -> Table:
        """The report for a terminal, with notes of the adapter's."""
        table = Table("", "tensors", "", title=Text(str(self.path)), title_justify="left")
        share = f"{self.coverage:.2%} of the values outside new heads"
        table.add_row("loaded", str(len(self.loaded)), share)
        for kind in ("new", "missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            shown = first_few([f"{name} {self.shapes.get(name, '')}".strip() for name in names])
            table.add_row(kind, str(len(names)), Text(shown))
        for note, given in self._notes():
            if given:
                table.add_row("note", "", Text(note))
        for note in notes:
            table.add_row("note", "", Text(note))
        return table

    def _notes(self) -> list[tuple[str, object]]:
        casts = ", ".join(f"{count} {cast}" for cast, count in self.casts.items())
        return [
            (f"'{self.prefix}' taken off the checkpoint's names", self.prefix),
            (f"'{self.added}' put before the checkpoint's names", self.added),
            (f"cast: {casts}", casts),
        ]


def load_weights(
    model: nn.Module,
    weights: Weights,
    config: ModelConfig,
    new_heads: Mapping[str, NewHead],
    added: Collection[str] = (),
) -> LoadReport:
    """Copies a checkpoint into the model and starts new heads, or raises and changes nothing.

    Prefixes that trainers and wrappers add to names are bridged, floating-point types are cast.

    Args:
        new_heads: module name -> how it starts; the checkpoint's tensors of that name are ignored.
        added: tensors that stay as they are where the checkpoint has none of the name.

    Raises:
        ConfigError: new_heads does not fit the model.
        CheckpointError: strict, and any other name or shape differs; or not strict, and less than
            `config.min_coverage` of the model's values would be filled.
    """
    # keep_vars: tied names hold the same object.
    state = model.state_dict(keep_vars=True)
    target = {unwrapped(name): t for name, t in state.items() if isinstance(t, Tensor)}
    source = _rename(weights.tensors, target)
    heads = start_heads(model, target, {**weights.tensors, **source.tensors}, new_heads)
    absent = tuple(n for n in target if n in added and n not in {*source.tensors, *heads.names})
    new = {*heads.names, *absent}
    body = {name: tensor for name, tensor in target.items() if name not in new}
    differences = _differences(body, source.tensors)
    matched = [name for name in body if name in source.tensors and name not in differences]
    extra = [
        name
        for name, original in source.originals.items()
        if name not in target and not {name, original} & heads.used
    ]
    report = LoadReport(
        path=weights.path,
        new=(*heads.names, *absent),
        unexpected=tuple(source.originals[n] for n in extra if not is_under(n, new_heads)),
        prefix=source.prefix,
        added=source.added,
        **_account(body, source.tensors, matched, differences),
        shapes={name: str(list(tensor.shape)) for name, tensor in body.items()}
        | {source.originals[name]: str(list(source.tensors[name].shape)) for name in extra}
        | differences,
    )
    _check(report, config)
    _copy(target, {name: source.tensors[name] for name in matched} | heads.values)
    return report


@dataclass(frozen=True)
class _Renamed:
    """A checkpoint's tensors under the model's names, and these names' originals in the file."""

    tensors: dict[str, Tensor]
    originals: dict[str, str]
    prefix: str
    added: str


def _rename(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> _Renamed:
    plain = {unwrapped(name): name for name in tensors}
    prefix, hits = matching_prefix(plain, target)
    added, more = matching_prefix(target, plain)
    if more > hits:
        prefix = ""
    else:
        added = ""
    originals: dict[str, str] = {}
    # Names with the prefix first: where both forms occur, they are the model's.
    for name in sorted(plain, key=lambda name: not name.startswith(prefix)):
        short = f"{added}{name.removeprefix(prefix)}"
        originals[f"{name} (without '{prefix}')" if short in originals else short] = plain[name]
    renamed = {name: tensors[original] for name, original in originals.items()}
    return _Renamed(renamed, originals, prefix, added)


def _account(
    body: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    matched: list[str],
    differences: Mapping[str, str],
) -> dict[str, Any]:
    """The report's fields on the model's tensors outside new heads."""
    # A tied tensor is filled under all its names when the checkpoint has one of them.
    filled = {id(body[name]) for name in matched}
    sizes = {id(tensor): tensor.numel() for tensor in body.values()}
    total = sum(sizes.values())
    casts = Counter(
        f"{_kind(source[name])} -> {_kind(body[name])}"
        for name in matched
        if source[name].dtype != body[name].dtype
    )
    left = [name for name in body if name not in differences]
    return {
        "loaded": tuple(name for name in left if id(body[name]) in filled),
        "missing": tuple(name for name in left if id(body[name]) not in filled),
        "mismatched": tuple(differences),
        "coverage": sum(sizes[tensor] for tensor in filled) / total if total else 1.0,
        "casts": casts,
    }


def _differences(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, str]:
    """Names on both sides whose tensors do not fit, and how they differ."""
    differences = {}
    first_names: dict[int, str] = {}
    for name in (name for name in target if name in source):
        ours, theirs = target[name], source[name]
        # Scalars: old checkpoints hold them as one-element vectors.
        scalar = ours.numel() == theirs.numel() == 1 and {ours.dim(), theirs.dim()} == {0, 1}
        twin = first_names.setdefault(id(ours), name)
        if ours.shape != theirs.shape and not scalar:
            differences[name] = f"{list(ours.shape)}, in the checkpoint {list(theirs.shape)}"
        elif _family(ours) != _family(theirs):
            differences[name] = f"{_kind(ours)}, in the checkpoint {_kind(theirs)}"
        elif twin != name and twin not in differences and not torch.equal(theirs, source[twin]):
            differences[name] = f"tied to {twin}, in the checkpoint not equal to it"
    return differences


def _family(tensor: Tensor) -> str:
    """Types are cast within a family: integers as floats would be quantised weights misread."""
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "integer"


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _copy(target: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value.reshape(target[name].shape))


def _check(report: LoadReport, config: ModelConfig) -> None:
    kinds = {
        "missing in the checkpoint": [n for n in report.missing if not n.endswith(_OPTIONAL)],
        "unexpected in the checkpoint": report.unexpected,
        "mismatched": report.mismatched,
    }
    if config.strict and any(kinds.values()):
        details = [
            f"  {len(names)} {kind}: {first_few([f'{n} {report.shapes[n]}' for n in names], 3)}"
            for kind, names in kinds.items()
            if names
        ]
        raise CheckpointError(
            f"{report.path}: every tensor of model and checkpoint must match (model.strict); got"
            f" {len(report.loaded)} that match and these that do not:\n"
            + "\n".join(details)
            + f"\n  do: {_advice(report)}"
        )
    if not config.strict and report.coverage < config.min_coverage:
        raise CheckpointError(
            f"{report.path}: at least {config.min_coverage:.0%} of the model's values must load"
            f" (model.min_coverage); got {report.coverage:.1%}, as of a wrongly prefixed file or"
            f" another model's{_look_alikes(report)}; give a matching checkpoint, or lower"
            " model.min_coverage if so little is meant to load"
        )


def _advice(report: LoadReport) -> str:
    advice = []
    # Where the model only has more than the checkpoint, whole modules of it.
    present = {_part(name) for name in report.loaded}
    new = dict.fromkeys(_part(name) for name in report.missing)
    if new and present and present.isdisjoint(new) and not report.unexpected:
        advice.append(f"name what is new in finetune.new_heads ({first_few(new)}?)")
    modules = dict.fromkeys(name.rpartition(".")[0] for name in report.mismatched)
    # Heads are few; many such modules mean another model.
    if 0 < len(modules) <= 3:
        advice.append(f"name replaced heads in finetune.new_heads ({', '.join(modules)}?)")
    advice.append("set model.strict = false to load what fits")
    advice.append("or give a checkpoint of this very model")
    return ", ".join(advice) + (_look_alikes(report) if not report.loaded else "")


def _part(name: str) -> str:
    """What `finetune.new_heads` calls a tensor: its module, or a parameter that stands alone."""
    return name.removesuffix(".weight").removesuffix(".bias")


def _look_alike(name: str, candidates: Collection[str]) -> str | None:
    longer = (candidate for candidate in candidates if candidate.endswith(f".{name}"))
    close = difflib.get_close_matches(name, candidates, n=1)
    return next(longer, None) or next(iter(close), None)


def _look_alikes(report: LoadReport) -> str:
    """The first missing names, beside the most similar ones that the checkpoint has instead."""
    pairs = [
        f"'{guess}' for '{name}'"
        for name in report.missing[:3]
        if (guess := _look_alike(name, report.unexpected))
    ]
    return f"; nearest names: {', '.join(pairs)}" if pairs else ""
