"""Upstream's forward, without what makes the host wait for the device.

aurora checks the grid, the lead times and the levels on the device at every step, reads the lead
times back, and copies each list of levels or statistics from pageable memory. Here its own
functions run with a few of the names that they look up replaced: the same operations on the same
values, so the same bits. The decoder runs in chunks of patches (`patches`); with one the bits are
the same, too. What was checked is checked on the host instead, in `collate` and when the
adapter is made.

A batch is normalised where it lies, on the model's device, as in `aurora.rollout`. A model that is
called with a batch on the host normalises it there, and a GPU's last bits are others: torch divides
by a number there as it multiplies by the reciprocal.

A plain `aurora.Batch` takes upstream's own way, waits and all.
"""

import copy
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FunctionType, MethodType
from typing import Any

import aurora
import numpy as np
import torch
from aurora import normalisation
from aurora.model import fourier, posencoding
from aurora.model.decoder import Perceiver3DDecoder
from aurora.model.encoder import Perceiver3DEncoder
from aurora.model.swin3d import Swin3DTransformerBackbone
from aurora.model.util import unpatchify
from torch import Tensor
from torch.utils._pytree import register_dataclass

from fastft.errors import AdapterError


def constant(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """`torch.tensor`, but a copy to a GPU leaves from page-locked memory and is not waited for."""
    host = torch.tensor(data, dtype=dtype)
    if torch.device(device or "cpu").type != "cuda" or not torch.cuda.is_available():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class CheckedMetadata(aurora.Metadata):
    """Metadata whose latitudes and longitudes were checked before they went to the device."""

    def __post_init__(self) -> None:
        """Checks nothing."""


@dataclass
class DeviceBatch(aurora.Batch):
    """A batch on the model's device, a multiple of the patch size high; its methods never wait.

    A step from it is as long as the model's own time step.

    Attributes:
        decoded: of a prediction, what the class changes after the decoder, as it was before
            (`variants`): normalised, by name, `[B, 1, (C,) H, W]`.
    """

    decoded: dict[str, Tensor] | None = None

    def normalise(self, surf_stats: dict[str, tuple[float, float]]) -> "DeviceBatch":
        """As upstream's."""
        return _normalise(self, surf_stats)

    def unnormalise(self, surf_stats: dict[str, tuple[float, float]]) -> "DeviceBatch":
        """As upstream's."""
        return dataclasses.replace(_unnormalise(self, surf_stats), decoded=self.decoded)

    def _fmap(self, f: Callable[[Tensor], Tensor]) -> "DeviceBatch":
        metadata, decoded = self.metadata, self.decoded
        return dataclasses.replace(
            self,
            surf_vars={name: f(values) for name, values in self.surf_vars.items()},
            static_vars={name: f(values) for name, values in self.static_vars.items()},
            atmos_vars={name: f(values) for name, values in self.atmos_vars.items()},
            metadata=dataclasses.replace(metadata, lat=f(metadata.lat), lon=f(metadata.lon)),
            decoded=decoded and {name: f(values) for name, values in decoded.items()},
        )


# Encoder and decoder are blocks: the core looks for the tensors that they take and return.
register_dataclass(CheckedMetadata)
register_dataclass(DeviceBatch)


def remove_waits(model: aurora.Aurora) -> None:
    """Makes the model take a `DeviceBatch` without waiting; to be called after `chunk_patches`.

    Raises:
        AdapterError: a lead time that upstream's embedding refuses.
    """
    hours = model.timestep.total_seconds() / 3600
    try:
        fourier.lead_time_expansion(torch.tensor([hours]), 2)
    except AssertionError as error:
        raise AdapterError(
            "model.options.timestep_hours: must be within 1 minute and 3 weeks, which the model's"
            f" embedding is made for; got {hours:g}; correct it"
        ) from error

    def encode(self: Perceiver3DEncoder, batch: aurora.Batch, lead_times: Tensor) -> Tensor:
        forward = _encode if isinstance(batch, DeviceBatch) else Perceiver3DEncoder.forward
        return forward(self, batch, lead_times)

    def decode(
        self: Perceiver3DDecoder,
        x: Tensor,
        batch: aurora.Batch,
        patch_res: tuple[int, int, int],
        lead_times: Tensor,
    ) -> aurora.Batch:
        if not isinstance(batch, DeviceBatch):
            return Perceiver3DDecoder.forward(self, x, batch, patch_res, lead_times)
        # It reads them back, as the device rounded them, to compute the time of the prediction.
        rounded = hours if lead_times.dtype == torch.float64 else float(np.float32(hours))
        return _decode(self, x, batch, patch_res, timedelta(hours=rounded))

    # Bound, so that a deep copy of the model computes with the copy's weights.
    model.encoder.forward = MethodType(encode, model.encoder)
    model.decoder.forward = MethodType(decode, model.decoder)
    model.backbone.forward = MethodType(_run_backbone, model.backbone)


def _decode(
    decoder: Any,
    x: Tensor,
    batch: DeviceBatch,
    patch_res: tuple[int, int, int],
    lead_time: timedelta,
) -> DeviceBatch:
    """As upstream's, in chunks of patches (`patches`)."""
    metadata = batch.metadata
    height, width = len(metadata.lat), metadata.lon.shape[-1]

    def predicted(variables: dict[str, Tensor]) -> tuple[str, ...]:
        modulated = (f"{name}_mod" for name in variables if name in decoder.modulation_heads)
        return (*variables, *modulated)

    surf_vars, atmos_vars = predicted(batch.surf_vars), predicted(batch.atmos_vars)
    levels = constant(metadata.atmos_levels, device=x.device)
    encoded = _levels["levels_expansion"](levels, decoder.embed_dim)
    x = x.unflatten(1, (patch_res[0], -1))
    surface, upper = (
        unpatchify(values.transpose(1, 2), len(names), height, width, decoder.patch_size)
        for names, values in zip(
            (surf_vars, atmos_vars),
            decoder.decode_patches(x, encoded, surf_vars, atmos_vars, metadata.atmos_levels),
            strict=True,
        )
    )
    return DeviceBatch(
        {name: surface[:, i, 0] for i, name in enumerate(surf_vars)},
        batch.static_vars,
        {name: upper[:, i] for i, name in enumerate(atmos_vars)},
        dataclasses.replace(
            metadata,
            lat=metadata.lat.to(torch.float32),
            lon=metadata.lon.to(torch.float32),
            time=tuple(time + lead_time for time in metadata.time),
            rollout_step=metadata.rollout_step + 1,
        ),
    )


class _Torch:
    """The module torch with `constant` for `tensor`."""

    tensor = staticmethod(constant)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _with_names(function: Any, **names: Any) -> Any:
    """The function in a copy of its module's namespace, in which `names` mean something else."""
    scope = {**function.__globals__, **names}
    # Dynamo would look names up in the module that the scope is named after.
    del scope["__name__"]
    made = FunctionType(
        function.__code__,
        scope,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _without_asserts(function: Any) -> Any:
    """The function as `python -O` compiles it."""
    source = textwrap.dedent(inspect.getsource(function))
    names = dict(function.__globals__)
    exec(compile(source, inspect.getfile(function), "exec", optimize=1), names)
    return names[function.__name__]


def _unchecked(expansion: fourier.FourierExpansion) -> fourier.FourierExpansion:
    made = copy.copy(expansion)
    made.assert_range = False
    return made


_torch = _Torch()
_batches = {"Batch": DeviceBatch, "Metadata": CheckedMetadata}
_atmos = _with_names(normalisation.normalise_atmos_var, torch=_torch)
_normalise = _with_names(aurora.Batch.normalise, **_batches, normalise_atmos_var=_atmos)
_unnormalise = _with_names(
    aurora.Batch.unnormalise,
    **_batches,
    unnormalise_atmos_var=functools.partial(_atmos, unnormalise=True),
)
_levels = {"levels_expansion": _unchecked(fourier.levels_expansion)}
_lead_time = {"lead_time_expansion": _unchecked(fourier.lead_time_expansion)}
_grid = _with_names(
    posencoding.pos_scale_enc_grid, patch_root_area=_without_asserts(posencoding.patch_root_area)
)
_encode = _with_names(
    Perceiver3DEncoder.forward,
    torch=_torch,
    **_levels,
    **_lead_time,
    pos_expansion=_unchecked(fourier.pos_expansion),
    scale_expansion=_unchecked(fourier.scale_expansion),
    pos_scale_enc=_with_names(posencoding.pos_scale_enc, pos_scale_enc_grid=_grid),
)
_run_backbone = _with_names(Swin3DTransformerBackbone.forward, **_lead_time)
