"""The run's surroundings: device, seeds, folder, signals, a record of versions and git state."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

import numpy as np
import torch

from fastft.atomic import write_file_atomically
from fastft.config import RunConfig, RunSection
from fastft.errors import ConfigError
from fastft.runfile import format_run_file

# The resolved run file's name in the run folder.
RUN_FILE = "run.toml"

# Stop signals closer than this are one request.
SAME_SECONDS = 2.0


@dataclass(frozen=True)
class Run:
    """An open run.

    Attributes:
        folder: exists and is writable.
        device: what the model lives on.
        seed: of weights, data order and dropout.
        signals: entered, says whether the user or the system asked the run to end.
    """

    folder: Path
    device: torch.device
    seed: int
    signals: "Signals"


@contextlib.contextmanager
def open_run(section: RunSection, *, write: bool = True) -> Iterator[Run]:
    """Makes the run folder, keeps other runs out of it, and seeds every generator.

    Args:
        write: False where nothing is to be written: no folder is made.

    Raises:
        ConfigError: the device is not there, or the folder cannot be written or is in use.
    """
    device = find_device(section.device)
    seed_everything(section.seed)
    were_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if section.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, read when its handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with _own_folder(section.folder) if write else contextlib.nullcontext():
            yield Run(section.folder, device, section.seed, Signals())
    finally:
        torch.use_deterministic_algorithms(were_deterministic, warn_only=only_warned)
        if device.type == "cuda":
            # A memory budget is this run's alone.
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def find_device(name: str) -> torch.device:
    """The device of `run.device`; 'auto' is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            raise ConfigError(
                f"run.device: must be a device of this machine; got '{name}' with {count} GPUs;"
                " use 'auto' or 'cpu'"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def make_folder(folder: Path) -> None:
    """Makes a folder and proves that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"run.folder: must be writable; got '{folder}': {error.strerror}; choose another folder"
        ) from None


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it; leaves no folder without content.

    By a record lock: a kill releases it, and loader workers, which may outlive a kill for seconds,
    do not inherit it.
    """
    existed = folder.exists()
    make_folder(folder)
    path = folder / ".lock"
    try:
        with path.open("a") as lock:
            _lock(lock, folder)
            yield
    finally:
        if not existed and list(folder.iterdir()) == [path]:
            path.unlink()
            folder.rmdir()


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"run.folder: must be this run's alone; '{folder}' is in use by another run; wait"
                " for it or choose another folder"
            ) from None
        raise ConfigError(
            f"run.folder: must be on a file system with locks; got '{folder}': {error.strerror};"
            " choose another folder"
        ) from None


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that training draws from, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Signals:
    """SIGTERM or Ctrl-C ask for a stop after the current step; a later one ends at once.

    One that comes within `SAME_SECONDS` is taken for the same: launchers forward to the main
    process what its whole group has got already.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            # Only the main thread may set handlers; elsewhere the caller's stay in place.
            with contextlib.suppress(ValueError):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: it was not installed from Python, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
        elif now - self._received_at > SAME_SECONDS:
            raise KeyboardInterrupt


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and git state."""
    versions = {}
    for package in ("fastft", "torch", "triton", "numpy", "timm", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": {"type": device.type, "name": name, "cpu_count": os.cpu_count()},
        "git": _git_state(),
    }


def write_record(folder: Path, config: RunConfig, device: torch.device) -> None:
    """Writes the resolved run file, and adds this start to the run folder's `environment.json`.

    That file is a list: what the run began with, then what each later start found.

    Raises:
        CheckpointError: the disk refused; both files are as before, or whole.
    """
    path = folder / "environment.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    started = datetime.now(UTC).isoformat(timespec="seconds")
    starts = [*earlier, {"started": started, **environment(device)}]
    for file, text in (
        (folder / RUN_FILE, format_run_file(config)),
        (path, json.dumps(starts, indent=2) + "\n"),
    ):
        write_file_atomically(
            file, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8")
        )


def _git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the current folder, None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
