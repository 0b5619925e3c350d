"""What a run must save to go on as if it had never stopped."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft.checkpoint import Saved, latest_checkpoint, read_meta
from fastft.config import RunConfig
from fastft.errors import ConfigError
from fastft.names import load_state_dict, state_dict
from fastft.optim import Optimizer
from fastft.runfile import read_run_file, to_tree
from fastft.runtime import RUN_FILE, rng_state, set_rng_state
from fastft.step import Ema, TrainingStep
from fastft.task import Task


@dataclass(frozen=True)
class TrainingState:
    """The parts of a run that change from step to step. The data's place is the step itself."""

    task: Task
    optimizer: Optimizer
    step: TrainingStep
    ema: Ema | None
    device: torch.device

    def model_state(self) -> dict[str, Tensor]:
        """The model's tensors, by name in the unwrapped model."""
        return state_dict(self.task.model)

    def ema_state(self) -> dict[str, Tensor] | None:
        """The averaged weights with the model's other tensors, so that they load on their own."""
        return {**self.model_state(), **self.ema.average} if self.ema else None

    def training_state(self) -> dict[str, Any]:
        """Everything else: optimizer, loss scale and counters, random generators."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "guard": self.step.guard.state_dict(),
            "rng": rng_state(self.device),
        }

    def restore(self, saved: Saved) -> int:
        """Continues from a checkpoint of the same run; returns the number of finished steps.

        Raises:
            CheckpointError: it holds another model or other trained parameters.
        """
        load_state_dict(self.task.model, saved.model, where="checkpoint")
        self.optimizer.load_state_dict(saved.training["optimizer"])
        self.step.guard.load_state_dict(saved.training["guard"])
        if self.ema is not None and saved.ema is not None:
            for name, average in self.ema.average.items():
                average.copy_(saved.ema[name])
        set_rng_state(saved.training["rng"], self.device)
        return int(saved.meta["step"])


# What may differ when a run goes on: where it runs, how far, and how it is watched.
_FREE = ("run.steps", "run.device", "data.workers", "data.prefetch", "data.checks", "evaluate",
         "checkpoint", "log", "model.checkpoint", "data.validation", "data.test")  # fmt: skip


def find_resumed(config: RunConfig) -> Path | None:
    """The checkpoint that the run goes on from, None where it starts anew.

    Raises:
        ConfigError: the folder holds a run and `checkpoint.resume` is 'never', the run is finished,
            or its settings were others.
    """
    folder = config.run.folder
    latest = latest_checkpoint(folder)
    if latest is None:
        return None
    step = read_meta(latest)["step"]
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"run.folder: '{folder}' holds a run at step {step}; go on with it with --resume, or"
            " choose another folder"
        )
    if step >= config.run.steps:
        raise ConfigError(
            f"run.steps: '{folder}' is at step {step} already, of {config.run.steps} asked for;"
            " raise run.steps or choose another folder"
        )
    began = dict(_flat(to_tree(read_run_file(folder / RUN_FILE))))
    now = dict(_flat(to_tree(config)))
    changed = [
        f"{folder / RUN_FILE}: {key}: must stay as the run began; it was {began.get(key)!r}, now"
        f" {now.get(key)!r}; change it back or start a new run"
        for key in sorted(began.keys() | now.keys())
        if began.get(key) != now.get(key)
        and not any(key == free or key.startswith(free + ".") for free in _FREE)
    ]
    if changed:
        raise ConfigError(changed)
    return latest


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a run file's tree as ('section.key', value)."""
    if isinstance(tree, (Mapping, list)):
        entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in entries:
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
