"""Every setting of a run: its unit, default and range. Imports no torch.

`RunConfig` mirrors a run file section by section. The dataclasses are frozen and strict: an
unknown key or a value of the wrong type is an error, never a guess. `fastft.runfile` reads and
writes them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]


def describe(text: str, **limits: Any) -> Any:
    """A field's description, which `fastft schema` shows, with further limits."""
    return Field(description=text, **limits)


@dataclass(frozen=True, kw_only=True, config=_strict)
class RunSection:
    """Where, how long and on what the run goes."""

    folder: Annotated[Path, describe("Run folder: logs, checkpoints, the resolved run file.")]
    steps: Annotated[Count, describe("Optimizer steps in all.")]
    seed: Annotated[int, describe("Seed of weights, data order and dropout.", ge=0)] = 0
    device: Annotated[
        str, describe("'auto', 'cpu', 'cuda' or 'cuda:N'.", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    ] = "auto"
    deterministic: Annotated[bool, describe("Only deterministic algorithms; slower on a GPU.")] = (
        False
    )


@dataclass(frozen=True, kw_only=True, config=_strict)
class ModelConfig:
    """Which model, and the checkpoint that fine-tuning starts from."""

    adapter: Annotated[str, describe("Adapter name: 'timm', 'python', ...")]
    checkpoint: Annotated[
        Path | None, describe("Pretrained weights; absent: start from random weights.")
    ] = None
    strict: Annotated[
        bool, describe("Every tensor of model and checkpoint must match, new heads aside.")
    ] = True
    min_coverage: Annotated[
        Fraction,
        describe("With strict = false: the least share of the model's values that must load."),
    ] = 0.5
    options: Annotated[dict[str, Any], describe("The adapter's own settings.")] = Field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True, config=_strict)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) through peft."""

    rank: Annotated[Count, describe("Rank of the update.")] = 8
    alpha: Annotated[Positive, describe("The update is scaled by alpha / rank.")] = 16
    dropout: Annotated[float, describe("Dropout before the update.", ge=0, lt=1)] = 0.0
    targets: Annotated[
        Patterns, describe("Name globs of the linear or convolution modules to adapt.")
    ] = ("*",)


@dataclass(frozen=True, kw_only=True, config=_strict)
class NewHead:
    """How a head that the checkpoint must not fill starts."""

    init: Annotated[
        Literal["random", "zero", "inherit"],
        describe("'zero' zeroes the head's last layer; 'inherit' copies another head."),
    ] = "random"
    source: Annotated[
        str | None, describe("With 'inherit': module name in the checkpoint to copy from.")
    ] = None


@dataclass(frozen=True, kw_only=True, config=_strict)
class Unfreeze:
    """Parameters that start frozen and are trained from a step on."""

    at_step: Annotated[int, describe("First step that trains them.", ge=0)]
    match: Annotated[Patterns, describe("Name globs of parameters.")]


@dataclass(frozen=True, kw_only=True, config=_strict)
class FinetuneConfig:
    """What is trained."""

    method: Annotated[
        Literal["full", "heads", "probe", "lora"],
        describe(
            "'full': everything; 'heads': only the modules in `heads`; 'probe': only the new"
            " heads, encoder frozen in eval mode; 'lora': low-rank updates and new heads."
        ),
    ] = "full"
    heads: Annotated[
        tuple[str, ...], describe("Module names trained by 'heads'; default: the new heads.")
    ] = ()
    new_heads: Annotated[
        dict[str, NewHead], describe("Module name -> how it starts, instead of the checkpoint.")
    ] = Field(default_factory=dict)
    freeze: Annotated[tuple[str, ...], describe("Name globs of parameters to freeze.")] = ()
    freeze_types: Annotated[
        tuple[str, ...], describe("Class names of modules to freeze, such as 'BatchNorm2d'.")
    ] = ()
    unfreeze: Annotated[
        tuple[Unfreeze, ...], describe("Stages at which frozen parameters start to train.")
    ] = ()
    lora: Annotated[LoraConfig, describe("Settings of method = 'lora'.")] = LoraConfig()


@dataclass(frozen=True, kw_only=True, config=_strict)
class DataSource:
    """One data set."""

    path: Annotated[Path, describe("File or folder.")]
    format: Annotated[
        Literal["auto", "npz", "images", "adapter"],
        describe("'npz': arrays; 'images': one folder per class; 'adapter': read by the adapter."),
    ] = "auto"
    name: Annotated[str | None, describe("Name in logs and messages; default: the path.")] = None
    weight: Annotated[Positive, describe("Share of the samples when data sets are mixed.")] = 1.0
    fields: Annotated[
        dict[str, str], describe("npz: field name -> array name, where they differ.")
    ] = Field(default_factory=dict)
    options: Annotated[dict[str, Any], describe("Settings for the adapter's reader.")] = Field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True, config=_strict)
class ChecksConfig:
    """Data checks before the first step."""

    max_samples: Annotated[Count, describe("Samples read per data set.")] = 1000
    outlier_sigma: Annotated[
        Positive, describe("Values farther than this many standard deviations are outliers.")
    ] = 12.0
    imbalance: Annotated[
        Positive, describe("Largest tolerated ratio of the most to the least frequent class.")
    ] = 20.0
    ignore: Annotated[tuple[str, ...], describe("Names of checks to leave out.")] = ()


@dataclass(frozen=True, kw_only=True, config=_strict)
class DataConfig:
    """Data sets and how they are read."""

    train: Annotated[tuple[DataSource, ...], describe("Training data sets.", min_length=1)]
    validation: Annotated[tuple[DataSource, ...], describe("Data to evaluate on.")] = ()
    test: Annotated[tuple[DataSource, ...], describe("For `evaluate --split test`.")] = ()
    batch_size: Annotated[Count, describe("Samples per micro-batch.")] = 32
    evaluation_batch_size: Annotated[
        Count | None, describe("Samples per evaluation batch; default: batch_size.")
    ] = None
    mixing: Annotated[
        Literal["sample", "batch"],
        describe("Several data sets: mix within a batch, or draw one data set per batch."),
    ] = "sample"
    workers: Annotated[int, describe("Processes per loader; 0 reads in the main one.", ge=0)] = 0
    prefetch: Annotated[Count, describe("Batches each worker reads ahead.")] = 2
    checks: Annotated[ChecksConfig, describe("Data checks.")] = ChecksConfig()


@dataclass(frozen=True, kw_only=True, config=_strict)
class LossTermBase:
    """What every loss term has."""

    weight: Annotated[float, describe("Factor in the sum.")] = 1.0
    prediction: Annotated[
        str | None, describe("Key of the model's output, where that is a mapping.")
    ] = None
    target: Annotated[str, describe("Field of the batch to compare with.")] = "targets"


@dataclass(frozen=True, kw_only=True, config=_strict)
class CrossEntropy(LossTermBase):
    """Cross entropy of logits `[B, C, ...]` with class indices `[B, ...]`."""

    name: Literal["cross_entropy"] = "cross_entropy"
    class_weights: Annotated[tuple[NonNegative, ...] | None, describe("One factor per class.")] = (
        None
    )
    label_smoothing: Annotated[Fraction, describe("Share spread evenly over classes.")] = 0.0
    ignore_index: Annotated[int, describe("Label that does not count.")] = -100


@dataclass(frozen=True, kw_only=True, config=_strict)
class MeanSquaredError(LossTermBase):
    """Mean squared error."""

    name: Literal["mse"] = "mse"


@dataclass(frozen=True, kw_only=True, config=_strict)
class MeanAbsoluteError(LossTermBase):
    """Mean absolute error."""

    name: Literal["mae"] = "mae"


@dataclass(frozen=True, kw_only=True, config=_strict)
class Huber(LossTermBase):
    """Huber loss: quadratic to `delta`, linear beyond (Huber 1964)."""

    name: Literal["huber"] = "huber"
    delta: Annotated[Positive, describe("Where it turns linear, in target units.")] = 1.0


@dataclass(frozen=True, kw_only=True, config=_strict)
class BinaryCrossEntropy(LossTermBase):
    """Binary cross entropy of logits; targets in [0, 1], negative ones do not count."""

    name: Literal["bce"] = "bce"
    positive_weight: Annotated[Positive, describe("Factor of positive targets.")] = 1.0


@dataclass(frozen=True, kw_only=True, config=_strict)
class Dice(LossTermBase):
    """Soft Dice loss (Milletari et al. 2016, arXiv 1606.04797) of logits."""

    name: Literal["dice"] = "dice"
    smooth: Annotated[Positive, describe("Added to numerator and denominator.")] = 1.0
    ignore_index: Annotated[int, describe("Label that does not count.")] = -100


@dataclass(frozen=True, kw_only=True, config=_strict)
class Focal(LossTermBase):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002) of logits."""

    name: Literal["focal"] = "focal"
    gamma: Annotated[NonNegative, describe("Exponent of (1 - p).")] = 2.0
    class_weights: Annotated[tuple[NonNegative, ...] | None, describe("One factor per class.")] = (
        None
    )
    ignore_index: Annotated[int, describe("Label that does not count.")] = -100


@dataclass(frozen=True, kw_only=True, config=_strict)
class PythonLoss(LossTermBase):
    """A user's own function `(prediction, target) -> scalar tensor`."""

    file: Annotated[Path, describe("Python file.")]
    name: Literal["python"] = "python"
    function: Annotated[str, describe("Function in that file.")] = "loss"


LossTerm = Annotated[
    CrossEntropy
    | MeanSquaredError
    | MeanAbsoluteError
    | Huber
    | BinaryCrossEntropy
    | Dice
    | Focal
    | PythonLoss,
    Field(discriminator="name"),
]


@dataclass(frozen=True, kw_only=True, config=_strict)
class Penalty:
    """`weight * sum |w|` (l1) or `weight * sum w^2` (l2) over the matched parameters."""

    kind: Literal["l1", "l2"]
    match: Annotated[Patterns, describe("Name globs of parameters.")]
    weight: Annotated[Positive, describe("Factor.")]


@dataclass(frozen=True, kw_only=True, config=_strict)
class LossConfig:
    """The sum of terms that is minimised. Adapters with a loss of their own need no terms."""

    terms: Annotated[tuple[LossTerm, ...], describe("Terms of the sum.")] = ()
    penalties: Annotated[tuple[Penalty, ...], describe("Terms on parameters.")] = ()


@dataclass(frozen=True, kw_only=True, config=_strict)
class ParameterRule:
    """Settings for the parameters that match; the first rule that matches a parameter wins."""

    match: Annotated[Patterns, describe("Name globs of parameters.")]
    lr: Annotated[NonNegative | None, describe("Peak learning rate.")] = None
    weight_decay: Annotated[NonNegative | None, describe("Weight decay.")] = None
    betas: Annotated[Betas | None, describe("Adam's decay rates.")] = None


@dataclass(frozen=True, kw_only=True, config=_strict)
class ScheduleConfig:
    """How the learning rate moves: linear warm-up, then the named curve."""

    name: Annotated[
        Literal["constant", "linear", "cosine", "step"], describe("Curve after the warm-up.")
    ] = "cosine"
    warmup_steps: Annotated[int, describe("Steps of linear warm-up from 0.", ge=0)] = 0
    end_factor: Annotated[
        Fraction, describe("linear, cosine: last learning rate over the peak.")
    ] = 0.0
    step_size: Annotated[Count, describe("step: steps between two drops.")] = 1000
    gamma: Annotated[Fraction, describe("step: factor of each drop.")] = 0.1


@dataclass(frozen=True, kw_only=True, config=_strict)
class OptimConfig:
    """Optimizer and parameter groups."""

    lr: Annotated[Positive, describe("Peak learning rate.")]
    name: Annotated[Literal["adamw", "adam", "sgd", "rmsprop"], describe("Optimizer.")] = "adamw"
    weight_decay: Annotated[
        NonNegative, describe("Decoupled in adamw, added to the gradient in the others.")
    ] = 0.0
    betas: Annotated[Betas, describe("adam, adamw: decay rates of the moments.")] = (0.9, 0.999)
    eps: Annotated[Positive, describe("adam, adamw, rmsprop: added to the denominator.")] = 1e-8
    momentum: Annotated[Fraction, describe("sgd, rmsprop.")] = 0.9
    nesterov: Annotated[bool, describe("sgd.")] = False
    alpha: Annotated[Fraction, describe("rmsprop: decay rate of the squared gradient.")] = 0.99
    decay_norms_and_biases: Annotated[
        bool, describe("Also decay parameters of one dimension: norms and biases.")
    ] = False
    layer_decay: Annotated[
        float | None,
        describe("Factor on the learning rate per layer away from the output.", gt=0, le=1),
    ] = None
    groups: Annotated[tuple[ParameterRule, ...], describe("Rules, first match wins.")] = ()
    schedule: Annotated[ScheduleConfig, describe("Learning-rate schedule.")] = ScheduleConfig()

    def __post_init__(self) -> None:
        """Refuses settings that exclude each other."""
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; got 0; set it or drop nesterov")


@dataclass(frozen=True, kw_only=True, config=_strict)
class StepConfig:
    """How one optimizer step is computed."""

    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        describe("'auto': bf16 autocast on a GPU that has it, fp32 elsewhere."),
    ] = "auto"
    accumulate: Annotated[Count, describe("Micro-batches per optimizer step.")] = 1
    compile: Annotated[
        Literal["off", "blocks", "model"],
        describe("torch.compile: each repeated block, or the whole model."),
    ] = "off"


@dataclass(frozen=True, kw_only=True, config=_strict)
class GradientsConfig:
    """Clipping, and what happens to a bad step. All of it is decided on the device."""

    clip_norm: Annotated[Positive | None, describe("Largest global L2 norm.")] = None
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


@dataclass(frozen=True, kw_only=True, config=_strict)
class EmaConfig:
    """Exponential moving average of the weights; evaluated and exported instead of them."""

    decay: Annotated[float, describe("Share kept per step.", gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=_strict)
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


@dataclass(frozen=True, kw_only=True, config=_strict)
class EvaluateConfig:
    """Evaluation on the validation data."""

    every_steps: Annotated[
        Count | None, describe("Steps between evaluations; default: only at the end.")
    ] = None
    metrics: Annotated[tuple[MetricConfig, ...], describe("Metrics beside the loss.")] = ()


@dataclass(frozen=True, kw_only=True, config=_strict)
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


@dataclass(frozen=True, kw_only=True, config=_strict)
class LogConfig:
    """What is written while training."""

    every_steps: Annotated[
        Count, describe("Steps between two log lines: the only time the host waits.")
    ] = 10
    tensorboard: Annotated[bool, describe("Write TensorBoard event files.")] = True


@dataclass(frozen=True, kw_only=True, config=_strict)
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
