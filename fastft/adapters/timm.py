"""timm image models (github.com/huggingface/pytorch-image-models) as classifiers or regressors."""

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import timm
import torch
from fastft_kernels.device import by_default
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from fastft.adapters.timm_fused import use_kernels
from fastft.adapters.unused import unused_weights
from fastft.config import DataSource
from fastft.errors import AdapterError, ConfigError, DataError
from fastft.portable import write_portable
from fastft.task import (
    Batch,
    Criterion,
    DataCheck,
    Dataset,
    Description,
    FieldSpec,
    Loader,
    Loss,
    Sample,
    Split,
    Task,
    repeated_blocks,
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class TimmOptions:
    """`[model.options]` of the timm adapter."""

    name: Annotated[str, Field(description="Architecture, as in timm.list_models().")]
    num_classes: Annotated[int, Field(ge=1, description="Outputs of the head.")]
    in_chans: Annotated[int, Field(ge=1, description="Input channels.")] = 3
    img_size: Annotated[
        int | None, Field(ge=1, description="Input height and width; default: the model's.")
    ] = None
    pretrained: Annotated[bool, Field(description="Start from timm's hub weights.")] = False
    mean: Annotated[
        tuple[float, ...] | None,
        Field(description="Channel means to subtract; default: the model's for images, 0 for npz."),
    ] = None
    std: Annotated[
        tuple[float, ...] | None,
        Field(description="Channel deviations to divide by; default: as for `mean`, 1 for npz."),
    ] = None
    augment: Annotated[
        bool, Field(description="Random crops and flips of training images (not of npz arrays).")
    ] = True
    arguments: Annotated[
        dict[str, Any], Field(description="Further arguments of timm.create_model.")
    ] = field(default_factory=dict)
    kernels: Annotated[
        Literal["auto", "off"],
        Field(
            description="'auto': on a GPU, attention of Swin blocks runs on fastft's kernel, which"
            " rounds otherwise than timm's; 'off': on timm's operators."
        ),
    ] = "auto"


class SharedDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382) as timm's, its rate in a tensor.

    A rate that is a number becomes part of a compiled graph, and in timm every block has its own:
    each block would be compiled anew.

    Args:
        drop_prob: probability that a sample's branch is dropped, in training.
        scale_by_keep: divide what is kept by the probability that it is.
    """

    keep: Tensor
    scale: Tensor

    def __init__(self, drop_prob: float, *, scale_by_keep: bool) -> None:
        super().__init__()
        keep = 1 - drop_prob
        scale = 1 / keep if keep > 0 and scale_by_keep else 1.0
        self.register_buffer("keep", torch.tensor(keep), persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` in and out."""
        if not self.training:
            return x
        draws = torch.rand((len(x), *[1] * (x.ndim - 1)), device=x.device)
        return x * ((draws < self.keep) * self.scale).to(x.dtype)


def share_drop_paths(model: nn.Module) -> nn.Module:
    """Replaces timm's `DropPath` modules in place; names and state dict stay as they are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is DropPath:
                shared = SharedDropPath(child.drop_prob, scale_by_keep=child.scale_by_keep)
                setattr(module, name, shared.train(child.training))
    return model


class TimmAdapter:
    """Any timm architecture. Sample fields: 'inputs' (image) and 'targets' (class index or value).

    Images (`format = "images"`) go through timm's own transforms. Arrays (`format = "npz"`) are
    `[C, H, W]`, or `[H, W]` for one channel; they are normalised with `mean` and `std` where those
    are set, and resized where the model's input size differs.

    The data checks compare inputs with mean 0 and deviation 1, which a model of 3 channels was
    pretrained on and images are normalised to: arrays of 3 channels without `mean` and `std` must
    be so normalised already, or a warning says that they are not. With other numbers of channels,
    only arrays that are normalised here are compared.
    """

    Options: ClassVar[type] = TimmOptions
    checks: Sequence[DataCheck] = ()

    def __init__(self, options: TimmOptions) -> None:
        self.options = options
        self._data_config: dict[str, Any] = {}
        self._transforms: dict[bool, Any] = {}

    def build(
        self,
        criterion: Criterion | None,
        *,
        device: torch.device,
        checkpoint: Path | None,
        pretrained: bool,
    ) -> Task:
        """The model under `[loss]`, which must have a term."""
        if criterion is None:
            raise ConfigError(
                "loss.terms: the timm adapter needs a loss; got none; add a [[loss.terms]] section"
                " such as name = 'cross_entropy'"
            )
        self._check_options()
        asked, option = self.options.pretrained, "model.options.pretrained"
        unfetched = unused_weights(option, asked, checkpoint, pretrained=pretrained)
        pretrained = asked and pretrained
        model = share_drop_paths(self._create(pretrained)).to(device)
        wanted = self.options.kernels == "auto" and by_default(device)
        notes = use_kernels(model) if wanted else []
        self._data_config = self._resolve_data_config(model)
        classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        return Task(
            model=model,
            loss=_make_loss(criterion),
            blocks=repeated_blocks(model),
            heads=heads,
            fields=self._fields(),
            layers=_layers(model),
            layer_norms=(LayerNorm,),
            pretrained=pretrained,
            notes=[*unfetched, *notes],
        )

    def weights(self, path: Path) -> Mapping[str, Tensor] | None:
        """timm checkpoints are plain state dicts: the core reads them."""
        return None

    def dataset(self, source: DataSource, split: Split) -> Dataset:
        """timm brings no data format of its own."""
        raise DataError(
            f"{source.path}: the timm adapter reads .npz files and image folders (one folder per"
            " class); got neither; convert it, or set `format`"
        )

    def transform(self, sample: Sample, split: Split) -> Sample:
        """Adds `inputs` as a float tensor `[C, H, W]` of the model's size, normalised."""
        values = np.asarray(sample["inputs"])
        if values.dtype == np.uint8 and values.ndim == 3 and values.shape[-1] == 3:
            if self.options.in_chans != 3:
                raise DataError(
                    f"inputs: images have 3 channels; got model.options.in_chans ="
                    f" {self.options.in_chans}; set it to 3, or store arrays in an .npz file"
                )
            image = self._image_transform(split == "train")(Image.fromarray(values))
        else:
            image = self._array_transform(values)
        return {**sample, "inputs": image}

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """Stacks every field."""
        return default_collate([dict(sample) for sample in samples])

    def prepare(self, task: Task, loader: Loader) -> None:
        """Nothing depends on the data."""

    def save(self, task: Task, path: Path) -> None:
        """A safetensors file for `timm.create_model(name, checkpoint_path=path)`."""
        metadata = {"architecture": self.options.name, "num_classes": str(self.options.num_classes)}
        write_portable(task.model, path, metadata)

    def describe(self, path: Path) -> Description | None:
        """The core's table of tensors says all."""
        return None

    def _check_options(self) -> None:
        channels = self.options.in_chans
        problems = [
            f"model.options.{name}: must hold one value for each of the {channels} channels;"
            f" got {len(values)}; add or remove some"
            for name in ("mean", "std")
            if (values := getattr(self.options, name)) is not None and len(values) != channels
        ]
        if any(value <= 0 for value in self.options.std or ()):
            problems.append(
                f"model.options.std: must be above 0; got {list(self.options.std or ())}; drop"
                " channels that never vary"
            )
        if problems:
            raise ConfigError(problems)

    def _create(self, pretrained: bool) -> nn.Module:
        options = self.options
        arguments: dict[str, Any] = {"num_classes": options.num_classes, **options.arguments}
        if options.in_chans != 3:
            arguments["in_chans"] = options.in_chans
        base = options.name.partition(".")[0]
        if not timm.is_model(base):
            close = difflib.get_close_matches(base, timm.list_models(), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else "; see timm.list_models()"
            raise AdapterError(
                f"model.options.name: must be a model of timm {timm.__version__}; got '{base}'"
                + hint
            )
        make = functools.partial(timm.create_model, options.name, pretrained=pretrained)
        try:
            if options.img_size is not None:
                try:
                    return make(img_size=options.img_size, **arguments)
                except TypeError as error:
                    # Only architectures that fix their input size at construction take it.
                    if "'img_size'" not in str(error):
                        raise
            return make(**arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
            advice = "correct the options"
            if isinstance(error, OSError):
                advice = "connect to the network, or set pretrained = false and model.checkpoint"
            raise AdapterError(
                f"model.options: timm must be able to make '{options.name}' with {arguments}; got"
                f" {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}; {advice}"
            ) from error

    def _resolve_data_config(self, model: nn.Module) -> dict[str, Any]:
        config = resolve_model_data_config(model)
        size = self.options.img_size
        if size is not None:
            config["input_size"] = (config["input_size"][0], size, size)
        for name, value in (("mean", self.options.mean), ("std", self.options.std)):
            if value is not None:
                config[name] = value
        return config

    def _fields(self) -> dict[str, FieldSpec]:
        normalised = self.options.mean is not None and self.options.std is not None
        compared = normalised or self.options.in_chans == 3
        statistics = {"mean": 0.0, "std": 1.0, "channel_axis": 0} if compared else {}
        classes = self.options.num_classes if self.options.num_classes > 1 else None
        return {"inputs": FieldSpec(**statistics), "targets": FieldSpec(classes=classes)}

    def _image_transform(self, training: bool) -> Any:
        if training not in self._transforms:
            # No colour jitter, timm's default: in measured data, brightness is what was measured.
            self._transforms[training] = create_transform(
                **self._data_config,
                is_training=training and self.options.augment,
                color_jitter=0.0,
            )
        return self._transforms[training]

    def _array_transform(self, values: np.ndarray) -> Tensor:
        image = torch.as_tensor(values, dtype=torch.float32)
        if image.ndim == 2:
            image = image[None]
        if image.ndim != 3 or image.shape[0] != self.options.in_chans:
            raise DataError(
                f"inputs: must be [{self.options.in_chans}, height, width], as"
                f" model.options.in_chans says; got {list(values.shape)}"
            )
        for name, operation in (("mean", torch.sub), ("std", torch.div)):
            statistics = getattr(self.options, name)
            if statistics is not None:
                image = operation(image, torch.tensor(statistics)[:, None, None])
        height, width = self._data_config["input_size"][1:]
        if image.shape[1:] != (height, width):
            image = functional.interpolate(
                image[None], size=(height, width), mode="bilinear", antialias=True
            )[0]
        return image


def _make_loss(criterion: Criterion) -> Any:
    def loss(model: nn.Module, batch: Batch) -> Loss:
        return criterion(model(batch["inputs"]), batch.data)

    return loss


def _layers(model: nn.Module) -> dict[str, int] | None:
    """timm's own layer numbers, 0 nearest the input, where the architecture defines them."""
    if not hasattr(model, "group_matcher"):
        return None
    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
    layers = cast(dict[str, int], group_parameters(model, matcher, reverse=True))
    return {name: int(layer) for name, layer in layers.items()}
