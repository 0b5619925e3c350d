"""A run's checkpoint folders `<run>/checkpoints/step-00000123/`: their layout, and reading them.

`meta.json` is written last and lists every other file's size and checksum, so that a folder can be
told whole without opening the large files.
"""

import json
import logging
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft.checkpoint.formats import read_safetensors, read_torch
from fastft.errors import CheckpointError

MODEL = "model.safetensors"
EMA = "ema.safetensors"
TRAINING = "training.pt"
META = "meta.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A training checkpoint.

    Attributes:
        model, ema: tensors by their plain module's names, on the device asked for.
        training: what `save_checkpoint` was given, on the CPU: RNG states live there, and an
            optimizer moves its own state to its parameters.
        meta: step, monitor, mode, value, metrics, versions.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    training: dict[str, Any]
    meta: dict[str, Any]


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The whole checkpoint of the highest step; damaged folders are passed over, with a warning."""
    whole = whole_checkpoints(run_folder)
    newest = max(_step_folders(run_folder), default=(0, None))[1]
    if newest and newest not in whole:
        _log.warning("%s: incomplete or damaged, passed over", newest)
    return whole[-1] if whole else None


def best_checkpoint(run_folder: Path) -> Path | None:
    """The whole checkpoint with the best monitored value, as the latest one defines it.

    None where no checkpoint has such a value that is finite; the later of equals.
    """
    whole = {folder: read_meta(folder) for folder in whole_checkpoints(run_folder)}
    if not whole:
        return None
    *_, newest = whole.values()
    sign = 1 if newest["mode"] == "max" else -1
    values = {
        folder: sign * value
        for folder, meta in whole.items()
        if (value := finite(meta["metrics"].get(newest["monitor"]))) is not None
    }
    return max(reversed(values), key=lambda folder: values[folder], default=None)


def finite(value: Any) -> float | None:
    """A number or scalar tensor as a float; None for None, NaN and infinities."""
    return float(value) if value is not None and math.isfinite(value) else None


def whole_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoint folders with every file in its full size, by step."""
    return [folder for _, folder in sorted(_step_folders(run_folder)) if is_checkpoint(folder)]


def find_checkpoint(path: Path) -> Path | None:
    """The folder itself, or a run folder's best checkpoint, its latest where none is best."""
    if is_checkpoint(path):
        return path
    return best_checkpoint(path) or latest_checkpoint(path)


def is_checkpoint(folder: Path) -> bool:
    """Whether every file is there in its full size."""
    try:
        files = read_meta(folder)["files"]
        return all(
            (folder / name).stat().st_size == entry["bytes"] for name, entry in files.items()
        )
    except (CheckpointError, OSError):
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    """A checkpoint's `meta.json`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / META
    try:
        meta = json.loads(path.read_text())
        complete = {"step", "monitor", "mode", "value", "metrics", "versions", "files"} <= set(meta)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: must describe a checkpoint of fastft; got {error}"
        ) from error
    if not complete:
        raise CheckpointError(f"{path}: must describe a checkpoint of fastft; got another file")
    return meta


def load_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> Saved:
    """Reads a checkpoint folder, after checking every file against its checksum.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    meta = read_meta(path)
    check_files(path)
    ema = read_safetensors(path / EMA, device)[0] if EMA in meta["files"] else None
    return Saved(
        model=read_safetensors(path / MODEL, device)[0],
        ema=ema,
        training=read_torch(path / TRAINING),
        meta=meta,
    )


def check_files(folder: Path, *names: str) -> None:
    """Raises CheckpointError unless the named files, by default all, are as they were written."""
    files = read_meta(folder)["files"]
    problems = []
    for name in names or files:
        path = folder / name
        try:
            found = fingerprint(path)
        except OSError as error:
            problems.append(f"{path}: must be readable; got {error.strerror}")
            continue
        if found["bytes"] != files[name]["bytes"]:
            size = files[name]["bytes"]
            problems.append(f"{path}: must have {size:,} bytes; got {found['bytes']:,}")
        elif found != files[name]:
            problems.append(f"{path}: must be as it was saved; got other content (checksum)")
    if problems:
        others = [other for other in whole_checkpoints(folder.parent.parent) if other != folder]
        instead = f"go on from {others[-1].name}" if others else "start the run anew"
        problems[-1] += f"; remove the folder {folder} to {instead}"
        raise CheckpointError(problems)


def fingerprint(path: Path) -> dict[str, int]:
    """Size and checksum of a file; zlib's CRC runs at several GB/s, faster than most disks."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def _step_folders(run_folder: Path) -> list[tuple[int, Path]]:
    folders = (run_folder / "checkpoints").glob("step-*")
    return [(int(found[1]), f) for f in folders if (found := re.fullmatch(r"step-(\d+)", f.name))]
