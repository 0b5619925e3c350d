"""How a run goes: its folder, steps, gradients, evaluation, checkpoints and logs."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastft.config.base import Count, DecayRate, Positive, describe, strict


@dataclass(frozen=True, kw_only=True, config=strict)
class RunSection:
    """Where, how long and on what the run goes."""

    folder: Annotated[Path, describe("Run folder: logs, checkpoints, the resolved run file.")]
    steps: Annotated[Count, describe("Optimizer steps in all.")]
    seed: Annotated[int, describe("Seed of weights, data order and dropout.", ge=0, lt=2**63)] = 0
    device: Annotated[
        str, describe("'auto', 'cpu', 'cuda' or 'cuda:N'.", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    ] = "auto"
    deterministic: Annotated[bool, describe("Only deterministic algorithms; slower on a GPU.")] = (
        False
    )


@dataclass(frozen=True, kw_only=True, config=strict)
class StepConfig:
    """How one optimizer step is computed."""

    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        describe("'auto': bf16 autocast on a GPU that has it, fp32 elsewhere."),
    ] = "auto"
    tf32: Annotated[
        bool,
        describe(
            "With bf16 or fp16, on a GPU: matrix products that stay in float32, because the model"
            " leaves autocast, run in TF32."
        ),
    ] = False
    accumulate: Annotated[
        Count,
        describe(
            "Micro-batches per optimizer step; the loss is the mean of their losses, which differs"
            " from one large batch where labels are ignored or weighted unevenly."
        ),
    ] = 1
    compile: Annotated[
        Literal["off", "blocks", "model"],
        describe("torch.compile: each repeated block, or the whole model."),
    ] = "off"
    kernels: Annotated[
        Literal["auto", "off"],
        describe(
            "Adam and gradient norm: 'auto': fastft's on a GPU; 'off': torch's. Kernels inside of a"
            " model are the adapter's, as model.options.kernels."
        ),
    ] = "auto"
    layer_norm: Annotated[
        Literal["auto", "fused", "torch"],
        describe(
            "'fused': fastft's, which under autocast returns the low precision; 'torch': the"
            " model's own; 'auto': fused on a GPU where nothing is compiled."
        ),
    ] = "auto"
    cuda_graphs: Annotated[
        Literal["off", "auto"],
        describe(
            "'auto': on a GPU, forward and backward of a step are replayed from one CUDA graph,"
            " where that gives the same losses and is measured 5 % faster, for each of up to 8"
            " forms (shapes, data sets, host values) of its batches; graphs hold a step's"
            " activations all the time."
        ),
    ] = "off"


@dataclass(frozen=True, kw_only=True, config=strict)
class ZClipConfig:
    """Clipping by a norm's z-score among past norms (Kumar et al. 2025, arXiv 2504.02507)."""

    z_limit: Annotated[
        Positive, describe("Norms beyond this many standard deviations are clipped.")
    ] = 2.5
    decay: Annotated[DecayRate, describe("Of the moving mean and variance of norms.")] = 0.97
    warmup_steps: Annotated[Count, describe("Steps that only collect both.")] = 25


@dataclass(frozen=True, kw_only=True, config=strict)
class GradientsConfig:
    """Clipping, and what happens to a bad step. All of it is decided on the device."""

    clip_norm: Annotated[Positive | None, describe("Largest global L2 norm.")] = None
    zclip: Annotated[
        ZClipConfig | None, describe("Adaptive clipping; on top of clip_norm where both are set.")
    ] = None
    on_nonfinite: Annotated[
        Literal["skip", "warn"],
        describe("Inf or NaN in the gradients: leave everything unchanged, or only report."),
    ] = "skip"
    explode_norm: Annotated[
        Positive | None, describe("A global norm above this counts as exploding.")
    ] = None
    on_explode: Annotated[
        Literal["skip", "warn"], describe("An exploding step: skip the update, or only report.")
    ] = "skip"
    stop_after: Annotated[
        int, describe("End the run after this many bad steps in a row; 0: never.", ge=0)
    ] = 20


@dataclass(frozen=True, kw_only=True, config=strict)
class EmaConfig:
    """Exponential moving average of the weights; evaluated and exported instead of them."""

    decay: Annotated[float, describe("Share kept per step.", gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=strict)
class MetricConfig:
    """One evaluation metric."""

    name: Annotated[
        Literal["accuracy", "f1", "precision", "recall", "iou", "dice", "mae", "rmse"],
        describe("Metric."),
    ]
    average: Annotated[
        Literal["micro", "macro", "weighted"] | None,
        describe("How classes are averaged; default: micro for accuracy, macro for the others."),
    ] = None
    per_class: Annotated[bool, describe("Also report each class.")] = False
    prediction: Annotated[
        str | None, describe("Key of the model's output, where that is a mapping.")
    ] = None
    target: Annotated[str, describe("Field of the batch to compare with.")] = "targets"
    ignore_index: Annotated[int | None, describe("Label that does not count.")] = None


@dataclass(frozen=True, kw_only=True, config=strict)
class EvaluateConfig:
    """Evaluation on the validation data."""

    every_steps: Annotated[
        Count | None, describe("Steps between evaluations; default: only at the end.")
    ] = None
    metrics: Annotated[tuple[MetricConfig, ...], describe("Metrics beside the loss.")] = ()
    options: Annotated[
        dict[str, Any], describe("Settings of the adapter's report, which `fastft evaluate` makes.")
    ] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=strict)
class CheckpointConfig:
    """Saving and going on."""

    every_steps: Annotated[
        Count | None, describe("Steps between checkpoints; default: only at the end.")
    ] = None
    keep_last: Annotated[Count, describe("Checkpoints kept beside the best one.")] = 2
    monitor: Annotated[str, describe("Validation value that names the best checkpoint.")] = "loss"
    mode: Annotated[Literal["min", "max"], describe("Whether low or high is best.")] = "min"
    resume: Annotated[
        Literal["never", "auto"],
        describe("'auto': go on from the run folder's last checkpoint; 'never': refuse it."),
    ] = "never"


@dataclass(frozen=True, kw_only=True, config=strict)
class LogConfig:
    """What is written while training."""

    every_steps: Annotated[
        Count, describe("Steps between two log lines: the only time the host waits.")
    ] = 10
    tensorboard: Annotated[bool, describe("Write TensorBoard event files.")] = True
