"""Reading weights that someone else saved."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastft.checkpoint.folder import EMA, MODEL, check_files, find_checkpoint, read_meta
from fastft.checkpoint.formats import Format, read_safetensors, read_torch, sniff
from fastft.errors import CheckpointError
from fastft.names import first_few

# Under which trainers keep the model, most trusted first; averaged weights last.
_USUAL_KEYS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params"),
    *("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_model_state_dict"),
)

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Weights:
    """Tensors of a checkpoint by name, on the CPU and possibly still on disk (memory-mapped).

    Attributes:
        path: the file they came from.
        key: where in it, such as 'model.state_dict'; empty: at the top.
        others: further places in it that hold tensors, optimizer state aside.
        skipped: names beside the tensors whose values are none.
    """

    path: Path
    format: Format
    tensors: dict[str, Tensor]
    key: str = ""
    others: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def read_weights(path: Path) -> Weights:
    """The weights of a safetensors or torch file, or of a fastft run or checkpoint folder.

    A torch file's weights may lie under the usual keys or in any dict down to the third level.
    A fastft checkpoint gives its averaged weights where it has them, a run folder its best one.

    Raises:
        CheckpointError: missing, damaged, no checkpoint, holding code (never run), or no tensors.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: must be a checkpoint; got no such file; check the path")
    if path.is_dir():
        path = _weights_file(path)
    kind = sniff(path)
    if kind == "safetensors":
        tensors, _ = read_safetensors(path)
        if not tensors:
            raise CheckpointError(f"{path}: must hold tensors; got none; give another checkpoint")
        return Weights(path, kind, tensors)
    return _find_state(path, kind, read_torch(path, mmap=True))


def _weights_file(folder: Path) -> Path:
    checkpoint = find_checkpoint(folder)
    if checkpoint:
        name = EMA if EMA in read_meta(checkpoint)["files"] else MODEL
        check_files(checkpoint, name)
        return checkpoint / name
    inside = sorted(f.name for f in folder.iterdir() if f.suffix in _SUFFIXES)
    hint = f"name one of its files: {first_few(inside)}" if inside else "give a file"
    raise CheckpointError(
        f"{folder}: must be a checkpoint; got a folder without a whole checkpoint of fastft; {hint}"
    )


def _find_state(path: Path, kind: Format, content: Any) -> Weights:
    found = dict(_states(content)) if isinstance(content, Mapping) else {}
    if not found:
        got = f"keys {first_few([repr(k) for k in content])}" if isinstance(content, dict) else ""
        raise CheckpointError(
            f"{path}: must hold a dict of tensors by name; got"
            f" {got or type(content).__name__} without one; save the model's state_dict"
        )

    def order(key: str) -> tuple[int, int]:
        first = key.partition(".")[0]
        rank = _USUAL_KEYS.index(first) if first in _USUAL_KEYS else len(_USUAL_KEYS)
        return rank, -sum(t.numel() for t in found[key].values() if isinstance(t, Tensor))

    key, *others = sorted(found, key=order)
    state = found[key]
    tensors = {name: t.detach() for name, t in state.items() if isinstance(t, Tensor)}
    # At the top, what is no tensor is the trainer's own: epochs, settings.
    skipped = tuple(name for name in state if name not in tensors) if key else ()
    return Weights(path, kind, tensors, key, tuple(others), skipped)


def _states(content: Mapping[Any, Any], key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted key, dict) of every dict with tensors, without optimizers, to the third level."""
    if any(isinstance(value, Tensor) for value in content.values()):
        yield key, {name: value for name, value in content.items() if isinstance(name, str)}
    for name, value in content.items():
        # Optimizers number their tensors, so that names tell them apart.
        inside = isinstance(value, Mapping) and isinstance(name, str) and key.count(".") < 2
        if inside and not name.startswith(("optim", "sched", "scaler")):
            yield from _states(value, f"{key}.{name}".lstrip("."))
