"""Saving a run's checkpoints: atomic, and pruned to the last few and the best."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastft import __version__
from fastft.atomic import remove_leftovers, remove_whole, writing_explained, written_whole
from fastft.checkpoint.folder import (
    EMA,
    META,
    MODEL,
    TRAINING,
    best_checkpoint,
    checkpoint_path,
    fingerprint,
    finite,
    whole_checkpoints,
)
from fastft.checkpoint.formats import write_safetensors
from fastft.names import unwrapped


def save_checkpoint(
    run_folder: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    meta: Mapping[str, Any],
    ema_state: Mapping[str, Tensor] | None = None,
    *,
    keep_last: int = 2,
    monitor: str = "loss",
    mode: Literal["min", "max"] = "min",
) -> Path:
    """Saves a step, then removes older checkpoints but the last `keep_last` and the best.

    A kill at any moment leaves the earlier checkpoints whole, and the new one whole or absent. Only
    when a step is saved a second time may a kill lose that step's checkpoint.

    Args:
        model_state, ema_state: full tensors on any device; names lose torch.compile's and FSDP's
            additions.
        training_state: nested dicts and lists of tensors and plain values.
        meta: plain values for `meta.json`; `meta["metrics"][monitor]` is the monitored value, and
            it is never the best when it is absent or not finite.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk refused; what was saved before is untouched.
        TypeError: `training_state` holds an object that could not be loaded again.
    """
    folder = checkpoint_path(run_folder, step)
    with written_whole(folder) as temporary:
        remove_leftovers(folder.parent)
        temporary.mkdir()
        write_safetensors(temporary / MODEL, _plain_names(model_state))
        if ema_state is not None:
            write_safetensors(temporary / EMA, _plain_names(ema_state))
        _write_training(temporary / TRAINING, training_state)
        # JSON has no NaN: values that are not finite become null.
        metrics = {name: finite(value) for name, value in meta.get("metrics", {}).items()}
        described = {
            **meta,
            "step": step,
            "monitor": monitor,
            "mode": mode,
            "value": metrics.get(monitor),
            "metrics": metrics,
            "versions": _versions(meta),
            "files": {path.name: fingerprint(path) for path in temporary.iterdir()},
        }
        (temporary / META).write_text(json.dumps(described, indent=2, default=_plain) + "\n")
    with writing_explained(folder.parent):
        _prune(run_folder, folder, keep_last)
    return folder


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A module's extra state is no tensor; models rebuild it.
    return {unwrapped(name): t for name, t in state.items() if isinstance(t, Tensor)}


def _write_training(path: Path, state: Mapping[str, Any]) -> None:
    # Through a file object: given a path, torch hides the system's error (disk full) from us.
    with path.open("wb") as file:
        torch.save(dict(state), file)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unsafe:
        raise TypeError(f"training state must hold tensors and plain values; got {unsafe}")


def _versions(meta: Mapping[str, Any]) -> dict[str, str]:
    ours = {"fastft": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return ours | dict(meta.get("versions", {}))


def _plain(value: Any) -> Any:
    """Scalars of torch and numpy as numbers, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _prune(run_folder: Path, new: Path, keep_last: int) -> None:
    whole = whole_checkpoints(run_folder)
    kept = {new, best_checkpoint(run_folder), *whole[-keep_last:]}
    for folder in whole:
        if folder not in kept:
            remove_whole(folder)
