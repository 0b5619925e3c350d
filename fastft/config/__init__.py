"""Every setting of a run: its unit, default and range. Imports no torch.

`RunConfig` mirrors a run file section by section. The dataclasses are frozen and strict: an
unknown key or a value of the wrong type is an error, never a guess. `fastft.runfile` reads and
writes them.
"""

from pathlib import Path

from pydantic.dataclasses import dataclass

from fastft.config.base import strict
from fastft.config.data import ChecksConfig, DataConfig, DataSource, ReplayConfig
from fastft.config.loss import (
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    Focal,
    Huber,
    LossConfig,
    LossTerm,
    LossTermBase,
    MeanAbsoluteError,
    MeanSquaredError,
    Penalty,
    PythonLoss,
)
from fastft.config.memory import MemoryConfig, parse_bytes
from fastft.config.model import (
    FinetuneConfig,
    LoraConfig,
    ModelConfig,
    NewHead,
    Unfreeze,
    random_heads,
)
from fastft.config.optim import OptimConfig, ParameterRule, ScheduleConfig
from fastft.config.profile import ProfileConfig
from fastft.config.training import (
    CheckpointConfig,
    EmaConfig,
    EvaluateConfig,
    GradientsConfig,
    LogConfig,
    MetricConfig,
    RunSection,
    StepConfig,
    ZClipConfig,
)

__all__ = [
    "BinaryCrossEntropy",
    "CheckpointConfig",
    "ChecksConfig",
    "CrossEntropy",
    "DataConfig",
    "DataSource",
    "Dice",
    "EmaConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "Focal",
    "GradientsConfig",
    "Huber",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "LossTerm",
    "LossTermBase",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "MemoryConfig",
    "MetricConfig",
    "ModelConfig",
    "NewHead",
    "OptimConfig",
    "ParameterRule",
    "Penalty",
    "ProfileConfig",
    "PythonLoss",
    "ReplayConfig",
    "RunConfig",
    "RunSection",
    "ScheduleConfig",
    "StepConfig",
    "Unfreeze",
    "ZClipConfig",
    "parse_bytes",
    "random_heads",
]


@dataclass(frozen=True, kw_only=True, config=strict)
class RunConfig:
    """A run file."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    finetune: FinetuneConfig = FinetuneConfig()
    loss: LossConfig = LossConfig()
    step: StepConfig = StepConfig()
    gradients: GradientsConfig = GradientsConfig()
    ema: EmaConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    memory: MemoryConfig = MemoryConfig()
    profile: ProfileConfig | None = None

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        samples = self.data.samples_per_step
        return self.step.accumulate if samples is None else samples // self.data.micro_batch

    def __post_init__(self) -> None:
        """Refuses settings of different sections that exclude each other."""
        if self.data.samples_per_step is not None and self.step.accumulate != 1:
            raise ValueError(
                f"step.accumulate: follows from data.samples_per_step; got {self.step.accumulate};"
                " drop one of them"
            )
        if self.data.batch_size == "fit" and isinstance(self.memory.plan, Path):
            raise ValueError(
                "memory.plan: must be 'auto' or 'off' with data.batch_size = 'fit', since a plan is"
                f" for micro-batches of one size; got '{self.memory.plan}'; set data.batch_size to"
                " that size"
            )
        needs = {
            f"optim.moments = '{self.optim.moments}'": self.optim.moments != "fp32",
            "gradients.zclip": self.gradients.zclip is not None,
        }
        needing = " and ".join(setting for setting, is_set in needs.items() if is_set)
        if self.step.kernels == "off" and needing:
            raise ValueError(
                f"step.kernels: must be 'auto' for {needing}; got 'off'; drop one of them"
            )
        warmup = self.optim.schedule.warmup_steps
        if warmup >= self.run.steps:
            raise ValueError(
                f"optim.schedule.warmup_steps: must be below run.steps; got {warmup} of"
                f" {self.run.steps}; lower it"
            )
        if self.profile and self.profile.at_step + self.profile.steps > self.run.steps:
            raise ValueError(
                f"profile.at_step: must leave profile.steps = {self.profile.steps} of run.steps ="
                f" {self.run.steps}; got {self.profile.at_step}; lower it"
            )
        for number, stage in enumerate(self.finetune.unfreeze):
            if stage.at_step >= self.run.steps:
                raise ValueError(
                    f"finetune.unfreeze.{number}.at_step: must be below run.steps; got"
                    f" {stage.at_step} of {self.run.steps}; lower it"
                )
