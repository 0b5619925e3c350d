"""The seam between fastft and a model family: types only.

An adapter (see `Adapter`) turns its options into a `Task`: the model, the loss that training
minimises and evaluation reports, and what the core must know to compile, freeze, check and
measure it. CONTRIBUTING.md ("Writing an adapter") walks through one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastft.config import DataSource

Split = Literal["train", "validation", "test"]

# One example: field name -> array, tensor or host value.
Sample = Mapping[str, Any]


class Dataset(Protocol):
    """A map-style data set; see `Carry` for what one must have for `data.replay`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Batch:
    """Collated samples.

    Attributes:
        data: field name -> tensor, or any pytree of tensors and host values (dates, names).
        size: samples in it.
        source: data set it was drawn from; empty where samples of several are mixed.
        lr_factor: learning rate over its peak in this step, for losses whose weights follow it.
        slots, leads: with `data.replay`, each sample's place in the buffer, and how many steps the
            model has carried it on.
    """

    data: Mapping[str, Any]
    size: int
    source: str = ""
    lr_factor: float = 1.0
    slots: tuple[int, ...] = ()
    leads: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`; copies from pinned memory do not wait."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(self, data=tree_map_only(Tensor, move, dict(self.data)))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked host memory; called by torch's DataLoader."""
        return replace(self, data=tree_map_only(Tensor, Tensor.pin_memory, dict(self.data)))


@dataclass(frozen=True)
class Loss:
    """What a loss function returns.

    Attributes:
        total: scalar that is differentiated; a mean over the batch.
        parts: detached scalars to log, by name.
        predictions: what metrics compare with the batch, detached; a tensor, or a mapping of them.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    predictions: Any = None


class LossFunction(Protocol):
    """Runs the model on a batch. Used for training and, without gradients, for evaluation.

    It must not read device values on the host (`.item()`, `if tensor:`), nor keep Python state. One
    that differentiates the model inside (forces) enables gradients itself.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> Loss: ...


class Carry(Protocol):
    """How predictions become data, for `data.replay`; waits for nothing.

    The data sets say with an attribute `following` which sample is one step after each: indices, -1
    where there is none. Losses of batches with `leads` return predictions in training, too.

    An attribute `longest`, where there is one that is not None, is the most steps that a sample may
    be carried on where low-rank updates of the model's own are all that is trained.
    """

    def start(self, batch: Batch, states: Sequence[Any], /) -> Batch:
        """The batch with samples that start from their states; None: from the batch's data."""
        ...

    def states(self, batch: Batch, predictions: Any, /) -> Sequence[Any]:
        """What each sample starts from one step later: pytrees of detached tensors."""
        ...


class Criterion(Protocol):
    """The run file's `[loss]`: compares predictions with a batch's fields."""

    def __call__(self, predictions: Any, fields: Mapping[str, Any], /) -> Loss: ...


class Metric(Protocol):
    """Accumulates over evaluation batches; kept on the device until `compute`."""

    def update(self, predictions: Any, batch: Batch, /) -> None: ...
    def compute(self) -> Mapping[str, float]: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class TextTable:
    """A table for the console, a row as long as `columns`; the first column is text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Report(Metric, Protocol):
    """What `fastft evaluate` computes and leaves in files, in place of the adapter's metrics.

    An adapter offers one by a method `report(options, sources)`: the run file's
    `[evaluate.options]` and its training data. It raises ConfigError for options that it does not
    take, and opens no data before `update`: `train` makes it too, to check the options.
    """

    def table(self) -> TextTable:
        """What the console shows of it; after `update`, as `compute` and `write`."""
        ...

    def write(self, folder: Path) -> None:
        """Writes tables and pictures into an empty folder."""
        ...


@dataclass(frozen=True)
class Block:
    """A module that is compiled on its own, and may be recomputed; the repeated ones are layers.

    Attributes:
        name: as in the model; that of the module whose parameters it has, if it is not in it.
        dynamic: compile it once for all sizes, where those vary from batch to batch; 'first': for
            all sizes of tensors' first axes, and anew where others change.
        differentiates: it returns derivatives of its own, for a loss that is differentiated once
            more: it is compiled with them, and is neither planned for nor recomputed.
        compile: False: no layer, and eager with `step.compile = "blocks"`, as an encoder that
            takes dates. Tensors inside of its arguments and outputs are seen where those are
            pytree nodes (`torch.utils._pytree.register_dataclass`).
        layer: False: compiled, but no layer, as what stands between stages.
    """

    name: str
    module: nn.Module
    dynamic: bool | Literal["first"] = False
    differentiates: bool = False
    compile: bool = True
    layer: bool = True


@dataclass(frozen=True)
class FieldSpec:
    """What the model expects of one field of a (transformed) sample; read by the data checks.

    Attributes:
        mean, std: statistics that the model's normalisation assumes, scalars or one per channel.
        channel_axis: axis of a sample's array that `mean` and `std` run along.
        classes: number of classes, where the field holds class indices.
        ignore_index: label that does not count.
    """

    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    channel_axis: int | None = None
    classes: int | None = None
    ignore_index: int | None = None


@dataclass(frozen=True)
class Task:
    """A model ready to be fine-tuned.

    Attributes:
        model: parameters on the device that `Adapter.build` was given.
        loss: see `LossFunction`.
        blocks: repeated modules, and what else may be recomputed, in forward order.
        heads: names of the modules that a new task usually replaces.
        metrics: the adapter's own; those of the run file are added by the core.
        fields: what the model expects of the data, by field.
        layers: parameter name -> layer number, 0 nearest the input, for layer-wise decay; None:
            derived from `layer_blocks`.
        low_rank: names of the parameters of low-rank updates that the model brings: what
            `finetune.method = 'lora'` then trains, instead of adding updates.
        layer_norms: subclasses of `nn.LayerNorm` that compute what it computes, so that the fused
            one may take their place.
        carry: see `Carry`; None: `data.replay` is refused.
        added: tensors beside the family's own, which a pretrained checkpoint need not have: where
            it has none, they stay as built, and are reported as new.
        double_backward: the loss is of derivatives of the model, so that its backward pass goes
            through another: only blocks that differentiate themselves are then compiled.
        new_heads: modules that the adapter has made for this run, beside those of
            `finetune.new_heads`: `finetune.method = 'lora'` trains them too.
        notes: what else is said when the model is loaded, such as which parts of a checkpoint are
            dropped.
    """

    model: nn.Module
    loss: LossFunction
    blocks: Sequence[Block] = ()
    heads: Sequence[str] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    fields: Mapping[str, FieldSpec] = field(default_factory=dict)
    layers: Mapping[str, int] | None = None
    low_rank: Sequence[str] = ()
    layer_norms: tuple[type[nn.LayerNorm], ...] = ()
    carry: Carry | None = None
    added: Sequence[str] = ()
    double_backward: bool = False
    new_heads: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def compiled_blocks(self) -> list[Block]:
        """Those that `step.compile = "blocks"` compiles."""
        return [block for block in self.blocks if block.compile]

    @property
    def layer_blocks(self) -> list[Block]:
        """The layers, for layer-wise decay and norms by layer."""
        return [block for block in self.compiled_blocks if block.layer]

    @property
    def planned_blocks(self) -> list[Block]:
        """Those that may be recomputed."""
        return [block for block in self.blocks if not block.differentiates]


@dataclass(frozen=True)
class Finding:
    """What a data check found.

    Attributes:
        check: the check's name, as in `data.checks.ignore`.
        severity: an 'error' stops the run, a 'warning' is printed.
        where: data set and field.
        what: the problem, with numbers.
        count: values or samples concerned.
        example: one of them, with its index.
        advice: what to do.
    """

    check: str
    severity: Literal["error", "warning"]
    where: str
    what: str
    count: int
    example: str
    advice: str


@dataclass(frozen=True)
class CheckData:
    """What a data check reads: samples after the adapter's transform, read anew at each pass.

    Attributes:
        sources: (data set name, split, samples), at most `data.checks.max_samples` of each.
        fields: the model's expectations.
    """

    sources: Sequence[tuple[str, Split, Iterable[Sample]]]
    fields: Mapping[str, FieldSpec]


# The function's name, dashes for underscores, is the check's name in `data.checks.ignore` and in
# its findings: `energy_bias` yields `Finding(check="energy-bias", ...)`.
DataCheck = Callable[[CheckData], Iterable[Finding]]


class NamedDataset(Dataset, Protocol):
    """A data set with the name it has in logs; its samples are transformed."""

    @property
    def name(self) -> str: ...


class Loader(Protocol):
    """Yields the batches of steps `first`, `first + 1`, ...; each depends on its step alone.

    Attributes:
        sources: the data sets, to go over once and in order.
        samples: of all of them together.
    """

    @property
    def sources(self) -> Sequence["NamedDataset"]: ...
    @property
    def samples(self) -> int: ...
    def batches(self, first: int = 0) -> Iterable[Batch]: ...
    def example(self) -> Batch: ...


@dataclass(frozen=True)
class Description:
    """What `fastft show` prints of a checkpoint: a title and rows of (name, value)."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Conversion:
    """Another program's options as a run file, which an adapter's class method `convert` makes.

    Attributes:
        run: the run file as a tree of tables, arrays and values.
        notes: what has no counterpart in it, or does something else.
    """

    run: Mapping[str, Any]
    notes: Sequence[str] = ()


class Adapter(Protocol):
    """A model family. Made with its parsed options: `adapter = Adapter(options)`.

    What only some families have is not listed here: `expect`, `optim_presets`, `report`,
    `statistics` and `convert`, in CONTRIBUTING.md ("Writing an adapter").

    Attributes:
        Options: pydantic dataclass that checks `[model.options]`.
        checks: data checks beside the core's.
    """

    Options: ClassVar[type]
    checks: Sequence[DataCheck]

    def build(
        self,
        criterion: Criterion | None,
        *,
        device: torch.device,
        checkpoint: Path | None,
        pretrained: bool,
    ) -> Task:
        """The task with freshly initialised weights on `device`.

        Args:
            criterion: the run file's `[loss]`, None where it has no terms.
            checkpoint: `model.checkpoint`, for families whose checkpoints say the architecture.
            pretrained: False where weights will be loaded over everything, so that none need be
                fetched from a hub.
        """
        ...

    def weights(self, path: Path) -> Mapping[str, Tensor] | None:
        """The checkpoint's tensors under this model's names; None: the core reads the file."""
        ...

    def dataset(self, source: DataSource, split: Split) -> Dataset:
        """Opens a data set in the family's own format (`format = "adapter"`)."""
        ...

    def transform(self, sample: Sample, split: Split) -> Sample:
        """One raw sample as the model takes it; runs in loader workers, with seeded global RNGs."""
        ...

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """Samples as one batch; runs in loader workers."""
        ...

    def prepare(self, task: Task, loader: Loader) -> None:
        """What depends on the data, before the optimizer is made: energy bias, statistics."""
        ...

    def save(self, task: Task, path: Path) -> None:
        """Writes the checkpoint that the family's own tools open."""
        ...

    def describe(self, path: Path) -> Description | None:
        """The family's view of a checkpoint; None: the core's table of tensors."""
        ...


def repeated_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The repeated modules that hold most of a model's parameters, in definition order.

    Of the module classes that occur at least twice and hold nearly as many parameters as any such
    class does, the one that occurs most often: a stage's blocks rather than the stages. Classes
    with a single weight matrix each, such as a convolution with its norm, come last.
    """
    counts: dict[type, int] = {}
    sizes: dict[type, int] = {}
    matrices: dict[type, int] = {}
    for module in model.modules():
        if module is model or not next(iter(module.children()), None):
            continue
        kind = type(module)
        counts[kind] = counts.get(kind, 0) + 1
        sizes[kind] = sizes.get(kind, 0) + sum(p.numel() for p in module.parameters())
        several = sum(p.ndim > 1 for p in module.parameters())
        matrices[kind] = max(matrices.get(kind, 0), several)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    kinds = [k for k, n in counts.items() if n >= 2 and not issubclass(k, containers)]
    kinds = [kind for kind in kinds if matrices[kind] > 1] or kinds
    if not kinds:
        return ()
    largest = max(sizes[kind] for kind in kinds)
    chosen = max((k for k in kinds if sizes[k] >= 0.8 * largest), key=lambda kind: counts[kind])
    blocks = []
    for name, module in model.named_modules():
        inside = any(name.startswith(block.name + ".") for block in blocks)
        if type(module) is chosen and not inside:
            blocks.append(Block(name, module))
    return tuple(blocks)
