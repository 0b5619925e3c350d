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
from fastft.names import load_state_dict, named_parameters, state_dict
from fastft.runfile import read_run_file, to_tree
from fastft.runtime import RUN_FILE, rng_state, set_rng_state
from fastft.step import Ema, TrainingStep
from fastft.task import Task


@dataclass(frozen=True)
class TrainingState:
    """The parts of a run that change from step to step. The data's place is the step itself.

    Attributes:
        data: training data sets and how many samples they have, which must stay the same.
    """

    task: Task
    step: TrainingStep
    ema: Ema | None
    device: torch.device
    data: Mapping[str, int]

    def model_state(self) -> dict[str, Tensor]:
        """The model's tensors, by name in the unwrapped model."""
        return state_dict(self.task.model)

    def ema_state(self) -> dict[str, Tensor] | None:
        """The averaged weights with the model's other tensors, so that they load on their own."""
        if self.ema is None:
            return None
        model, average = self.task.model, self.ema.average
        by_parameter = {id(p): average.get(name) for name, p in named_parameters(model)}
        # Under every name of a tied parameter, or loading would mix average and weight.
        tied = ((name, by_parameter[id(p)]) for name, p in named_parameters(model, tied=True))
        return {**self.model_state(), **{name: a for name, a in tied if a is not None}}

    def nonfinite_names(self) -> list[str]:
        """Trained parameters and running statistics with NaN or Inf; waits for the device."""
        named = {**self.step.optimizer.parameters, **self.step.statistics}
        bad = torch.stack([~torch.isfinite(p.detach()).all() for p in named.values()]).tolist()
        return [name for name, is_bad in zip(named, bad, strict=True) if is_bad]

    def training_state(self) -> dict[str, Any]:
        """Everything else: optimizer, loss scale and counters, random generators, replay buffer."""
        replay = self.step.replay
        return {
            "optimizer": self.step.optimizer.state_dict(),
            "guard": self.step.guard.state_dict(),
            "rng": rng_state(self.device),
            "data": dict(self.data),
            **({} if replay is None else {"replay": replay.state_dict()}),
        }

    def restore(self, saved: Saved) -> int:
        """Continues from a checkpoint of the same run; returns the number of finished steps.

        Raises:
            CheckpointError: it holds another model or other trained parameters.
            ConfigError: the training data changed.
        """
        began = saved.training["data"]
        if began != self.data:
            raise ConfigError(
                f"data.train: must stay as the run began, or its order is lost; it had"
                f" {_sizes(began)} samples, now {_sizes(self.data)}; restore it or start a new run"
            )
        load_state_dict(self.task.model, saved.model, where="checkpoint")
        self.step.optimizer.load_state_dict(saved.training["optimizer"])
        self.step.guard.load_state_dict(saved.training["guard"])
        if self.step.replay is not None:
            self.step.replay.load_state_dict(saved.training["replay"])
        if self.ema is not None and saved.ema is not None:
            for name, average in self.ema.average.items():
                average.copy_(saved.ema[name])
        set_rng_state(saved.training["rng"], self.device)
        return int(saved.meta["step"])


# What may differ when a run goes on: where it runs, how far, and how it is watched.
_FREE = (
    *("run.folder", "run.steps", "run.device", "evaluate", "checkpoint", "log", "model.checkpoint"),
    *("memory", "profile", "step.cuda_graphs"),
    *("data.workers", "data.prefetch", "data.checks", "data.validation", "data.test"),
    "data.replay.save",
)


def find_resumed(config: RunConfig) -> Path | None:
    """The checkpoint that the run goes on from, None where it starts anew.

    Raises:
        ConfigError: the folder holds a run and `checkpoint.resume` is 'never', or its settings were
            others.
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


def _sizes(data: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in data.items())


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a run file's tree as ('section.key', value)."""
    if isinstance(tree, (Mapping, list)):
        entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in entries:
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
