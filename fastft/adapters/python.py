"""A user's own Python file as an adapter.

The file defines a class `Adapter` (see `fastft.task.Adapter`), or just a function
`build(**arguments)` that returns the model, `(model, loss)`, or a `Task`. Beside `build` it may
define any of the adapter's other methods as functions of the same arguments: `dataset`,
`transform`, `collate`, `prepare`, `save`, `describe`, `weights`, and a list `checks`.

If `build` takes an argument `pretrained`, it is made false where other weights fill the model, and
for the fresh model that new heads at random are taken from.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import default_collate

from fastft.adapters.criterion import refuse_terms
from fastft.adapters.unused import unused_weights
from fastft.config import DataConfig, DataSource, NewHead, random_heads
from fastft.errors import AdapterError, ConfigError, DataError
from fastft.portable import write_portable
from fastft.runfile import parse
from fastft.task import (
    Adapter,
    Batch,
    Criterion,
    DataCheck,
    Dataset,
    Description,
    Loader,
    Loss,
    LossFunction,
    Sample,
    Split,
    Task,
    repeated_blocks,
)
from fastft.userfile import import_file

_ARGUMENTS = "model.options.arguments"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class PythonOptions:
    """`[model.options]` of the python adapter."""

    file: Annotated[Path, Field(description="Python file with `build` or a class `Adapter`.")]
    arguments: Annotated[
        dict[str, Any], Field(description="Passed to `build`, or the options of `Adapter`.")
    ] = field(default_factory=dict)


def open_python_adapter(options: PythonOptions) -> Adapter:
    """The adapter that a user's file defines."""
    module = import_file(options.file, where="model.options.file", error=AdapterError)
    kind = getattr(module, "Adapter", None)
    # Not the protocol that the file may import for its annotations.
    if kind is not None and kind is not Adapter:
        return cast(Adapter, kind(parse(kind.Options, options.arguments, key=_ARGUMENTS)))
    if not hasattr(module, "build"):
        raise AdapterError(
            f"{options.file}: must define a function build() or a class Adapter; got neither;"
            " define one that returns the model"
        )
    return FileAdapter(module, options)


open_python_adapter.Options = PythonOptions  # type: ignore[attr-defined]


class FileAdapter:
    """The functions of a user's file, each with a default where the file has none."""

    Options: ClassVar[type] = PythonOptions

    def __init__(self, module: ModuleType, options: PythonOptions) -> None:
        self._module = module
        self._options = options
        self._new_heads: Mapping[str, NewHead] = {}
        self.checks: Sequence[DataCheck] = getattr(module, "checks", ())

    def expect(self, data: DataConfig, new_heads: Mapping[str, NewHead]) -> None:
        """Whether heads are at random may be up to `build`."""
        self._new_heads = new_heads

    def build(
        self,
        criterion: Criterion | None,
        *,
        device: torch.device,
        checkpoint: Path | None,
        pretrained: bool,
    ) -> Task:
        """What `build(**arguments)` returns, completed to a task."""
        file, arguments = self._options.file, self._options.arguments
        signature = inspect.signature(self._module.build)
        try:
            bound = signature.bind(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"{_ARGUMENTS}: must fit build{signature} in {file};"
                f" got {json.dumps(arguments, default=str)}: {error}"
            ) from None
        bound.apply_defaults()
        asked, option = bound.arguments.get("pretrained"), f"{_ARGUMENTS}.pretrained"
        if "pretrained" in bound.arguments:
            notes = unused_weights(option, asked, checkpoint, pretrained=pretrained)
        else:
            notes = self._heads_as_built()
        if asked and not pretrained:
            bound.arguments["pretrained"] = False
        built = self._module.build(*bound.args, **bound.kwargs)
        loaded = bool(asked) and pretrained
        match built:
            case Task():
                own_loss, model = built.loss, built.model
            case nn.Module() as model:
                own_loss = None
            case (nn.Module() as model, own_loss) if callable(own_loss):
                pass
            case _:
                raise AdapterError(
                    f"{file}: build() must return an nn.Module, (nn.Module, loss function) or a"
                    f" Task; got {_kind(built)}; correct what it returns"
                )
        if own_loss is not None:
            refuse_terms(criterion, "build() returns its own loss", "remove one of the two")
        model.to(device)
        if isinstance(built, Task):
            return dataclasses.replace(
                built, pretrained=loaded or built.pretrained, notes=[*built.notes, *notes]
            )
        if own_loss is None and criterion is None:
            raise ConfigError(
                "loss.terms: build() returned no loss, so the run file needs one; got none; add a"
                " [[loss.terms]] section, or return (model, loss)"
            )
        loss = _wrap(own_loss) if own_loss is not None else _on_inputs(cast(Criterion, criterion))
        return Task(
            model=model,
            loss=loss,
            blocks=repeated_blocks(model),
            fields=getattr(self._module, "fields", {}),
            pretrained=loaded,
            notes=notes,
        )

    def _heads_as_built(self) -> list[str]:
        """Says so where new heads are at random only if `build` has them so."""
        random = random_heads(self._new_heads)
        if not random:
            return []
        return [
            f"finetune.new_heads: {', '.join(random)} as build() in {self._options.file} makes"
            " them; if it loads pretrained weights, give it an argument `pretrained`, and load none"
            " where that is false"
        ]

    def weights(self, path: Path) -> Mapping[str, Tensor] | None:
        """The file's `weights(path)`, else the core reads the checkpoint."""
        return self._module.weights(path) if hasattr(self._module, "weights") else None

    def dataset(self, source: DataSource, split: Split) -> Dataset:
        """The file's `dataset(source, split)`."""
        if hasattr(self._module, "dataset"):
            return self._module.dataset(source, split)
        raise DataError(
            f"{source.path}: must be an .npz file or an image folder, or"
            f" {self._options.file} must define dataset(source, split); neither holds"
        )

    def transform(self, sample: Sample, split: Split) -> Sample:
        """The file's `transform(sample, split)`, else the sample as it is."""
        if hasattr(self._module, "transform"):
            return self._module.transform(sample, split)
        return sample

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """The file's `collate(samples)`, else every field stacked."""
        if hasattr(self._module, "collate"):
            return self._module.collate(samples)
        return default_collate([dict(sample) for sample in samples])

    def prepare(self, task: Task, loader: Loader) -> None:
        """The file's `prepare(task, loader)`, else nothing."""
        if hasattr(self._module, "prepare"):
            self._module.prepare(task, loader)

    def save(self, task: Task, path: Path) -> None:
        """The file's `save(task, path)`, else a safetensors state dict."""
        if hasattr(self._module, "save"):
            self._module.save(task, path)
        else:
            write_portable(task.model, path)

    def describe(self, path: Path) -> Description | None:
        """The file's `describe(path)`, else the core's table of tensors."""
        return self._module.describe(path) if hasattr(self._module, "describe") else None


def _kind(value: Any) -> str:
    """What a value is, for messages: 'int', '(Net, str)'."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__


def _on_inputs(criterion: Criterion) -> LossFunction:
    def loss(model: nn.Module, batch: Batch) -> Loss:
        return criterion(model(batch["inputs"]), batch.data)

    return loss


def _wrap(own_loss: Any) -> LossFunction:
    """Lets a user's loss return a scalar tensor where it has no parts or predictions to report."""

    def loss(model: nn.Module, batch: Batch) -> Loss:
        result = own_loss(model, batch)
        return result if isinstance(result, Loss) else Loss(result)

    return loss
