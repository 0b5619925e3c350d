"""A model, and what the core must know of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from fastft.task.data import FieldSpec
from fastft.task.loss import Carry, LossFunction, Metric


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
        pretrained: `Adapter.build` has filled the model with weights of the family's own.
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
    pretrained: bool = False
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
