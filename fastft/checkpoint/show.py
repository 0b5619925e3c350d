"""Describing a checkpoint without its model."""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

from torch import Tensor

from fastft.checkpoint.folder import META, read_meta
from fastft.checkpoint.names import shared_prefix
from fastft.checkpoint.read import Weights, read_weights
from fastft.names import first_few, unwrapped
from fastft.task import Description

# Parts of a name that models give their last layers.
_HEAD = re.compile(r"^(\w*head\w*|classifier|fc|readout\w*|logits|output\w*|predictor|last_layer)$")


def describe_checkpoint(path: Path) -> Description:
    """Format, sizes, modules and likely heads of a checkpoint file or a fastft folder.

    Raises:
        CheckpointError: as `read_weights`.
    """
    weights = read_weights(path)
    names = {unwrapped(name): tensor for name, tensor in weights.tensors.items()}
    prefix = shared_prefix(names)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    modules: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for name, tensor in tensors.items():
        modules[name.partition(".")[0]] += tensor.numel()
        kinds[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    rows = [
        *_file_rows(weights),
        ("tensors", f"{len(tensors):,}"),
        ("parameters", f"{sum(modules.values()):,}"),
        *((f"bytes of {kind}", f"{count:,}") for kind, count in kinds.most_common()),
    ]
    if prefix:
        rows.append(("prefix", f"{prefix} (taken off when loading)"))
    rows += [(f"module {name}", f"{count:,} parameters") for name, count in modules.items()]
    rows += [(f"likely head {name}", shape) for name, shape in _likely_heads(tensors)]
    return Description(title=str(path), rows=rows)


def _file_rows(weights: Weights) -> list[tuple[str, str]]:
    rows = [
        ("file", str(weights.path)),
        ("format", weights.format),
        ("file size", f"{weights.path.stat().st_size:,} bytes"),
    ]
    if weights.key:
        rows.append(("weights under", weights.key))
    if weights.others:
        rows.append(
            ("also tensors under", first_few([key or "the top level" for key in weights.others]))
        )
    folder = weights.path.parent
    if (folder / META).exists():
        meta = read_meta(folder)
        rows.append(("step", str(meta["step"])))
        rows += [
            (f"metric {name}", f"{value:.6g}" if value is not None else "not finite")
            for name, value in meta["metrics"].items()
        ]
        rows += [(f"version of {name}", version) for name, version in meta["versions"].items()]
    return rows


def _likely_heads(tensors: Mapping[str, Tensor], count: int = 4) -> list[tuple[str, str]]:
    """(module, weight shape) of matrices whose names say head, or else of the last matrix.

    Below a number, as in `blocks.0.fc`, such a name is a repeated block's own.
    """
    matrices = [n for n, t in tensors.items() if t.dim() >= 2 and n.endswith("weight")]
    matrices.sort(key=_natural)
    named = [
        name
        for name in matrices
        if any(_HEAD.match(part) for part in takewhile(_is_word, name.split(".")))
    ]
    return [
        (name.rpartition(".")[0] or name, str(list(tensors[name].shape)))
        for name in (named or matrices[-1:])[-count:]
    ]


def _is_word(part: str) -> bool:
    return not part.isdigit()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 'layer.10' after 'layer.9'."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
