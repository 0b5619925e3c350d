"""What sets aurora's classes apart: the fields they take, and what the loss compares.

The plain classes predict what they take, and the loss is on what `forward` returns. The others
change the decoder's output after it, into values that no loss can take: angles, NaN where there
are no waves, values held above zero. Their `attach` keeps the decoder's normalised output as
`DeviceBatch.decoded`, and the loss is on that.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MethodType, SimpleNamespace
from typing import Any, cast

import aurora
import numpy as np
import torch
from aurora.insolation import insolation
from aurora.normalisation import level_to_str, log_transform
from torch import Tensor, nn

from fastft.adapters.aurora.forward import DeviceBatch, constant
from fastft.adapters.aurora.variables import Variables
from fastft.errors import DataError
from fastft.task import Sample


@dataclass(frozen=True)
class Pair:
    """A prediction and its target, `[B, H, W]` or `[B, C, H, W]`.

    Attributes:
        scale: that their difference is divided by; of an atmospheric variable one per level.
        present: where there is a target; None: everywhere.
    """

    predicted: Tensor
    target: Tensor
    scale: float | Sequence[float]
    present: Tensor | None = None


class Weather:
    """The plain classes.

    Args:
        variables: the run's.
        masked: predicted variables that are NaN in places.

    Attributes:
        reads: surface variables that files must hold.
        inputs, targets: surface variables of a batch.
        channels: what the loss adds up -> the variable that it belongs to.
        decoded: variables whose loss is on the decoder's output.
        absent: variables whose NaN the model itself takes, as where there are no waves.
        angles: variables in degrees of a circle.
    """

    def __init__(self, variables: Variables, masked: Sequence[str] = ()) -> None:
        self.variables, self.masked = variables, frozenset(masked)
        self.reads = self.inputs = self.targets = variables.surf
        self.channels = {name: name for name in (*variables.surf, *variables.atmos)}
        self.decoded: frozenset[str] = frozenset()
        self.absent: frozenset[str] = frozenset()
        self.angles: frozenset[str] = frozenset()

    def transform(self, sample: Sample, hours: float) -> Sample:
        """A sample of the files' variables as one of the model's; `hours`: of a step."""
        return sample

    def attach(self, model: aurora.Aurora) -> None:
        """Makes the model keep what the loss needs."""

    def predict(self, model: nn.Module, state: DeviceBatch) -> DeviceBatch:
        """One step of the model."""
        return model(state)

    def prescribe(
        self, predicted: DeviceBatch, targets: Mapping[str, Tensor], step: int
    ) -> DeviceBatch:
        """The prediction, with what is known beforehand filled in."""
        return predicted

    def pairs(
        self, predicted: DeviceBatch, batch: Mapping[str, Any], step: int
    ) -> Iterator[tuple[str, Pair]]:
        """Channels with what the loss compares.

        Physical values, whose difference is divided by the scale: that rounds once less than
        normalising both, and keeps less for the backward pass.
        """
        values = {**predicted.surf_vars, **predicted.atmos_vars}
        for name in dict.fromkeys(self.channels.values()):
            target = batch[name][:, step]
            if name in self.decoded:
                yield from self.decoded_pairs(name, predicted.decoded or {}, target, batch)
                continue
            present = ~target.isnan() if name in self.masked else None
            yield name, Pair(values[name][:, 0], target, self._scale(name, batch), present)

    def decoded_pairs(
        self, name: str, decoded: Mapping[str, Tensor], target: Tensor, batch: Mapping[str, Any]
    ) -> Iterator[tuple[str, Pair]]:
        """Channels of a variable in `decoded`, normalised; the scales are 1."""
        present = ~target.isnan() if name in self.masked else None
        ones = [1.0] * len(batch["levels"]) if name in self.variables.levels else 1.0
        yield name, Pair(decoded[name][:, 0], self._normalised(name, target, batch), ones, present)

    def _normalised(self, name: str, values: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if name not in self.variables.levels:
            location, scale = self.variables.statistics[name]
            return (values - location) / scale
        place = values.dtype, values.device
        scale = constant(self._scale(name, batch), *place)[:, None, None]
        return (values - constant(self.variables.location(name, batch["levels"]), *place)) / scale

    def _scale(self, name: str, batch: Mapping[str, Any]) -> float | list[float]:
        if name not in self.variables.levels:
            return self.variables.statistics[name].scale
        statistics = self.variables.levels[name]
        return [statistics[level_to_str(level)].scale for level in batch["levels"]]


class AirPollution(Weather):
    """AuroraAirPollution: differences from the past, then held above zero from the second step on.

    The loss is on the values before they are held.
    """

    def __init__(self, variables: Variables, masked: Sequence[str] = ()) -> None:
        super().__init__(variables, masked)
        differences = aurora.AuroraAirPollution._predict_difference_history_dim_lookup
        self.decoded = frozenset(differences) & {*variables.surf, *variables.atmos}

    def attach(self, model: aurora.Aurora) -> None:
        """See `Weather.attach`."""
        hook, names = aurora.AuroraAirPollution._post_decoder_hook, self.decoded

        def keep(self: Any, batch: aurora.Batch, pred: aurora.Batch) -> aurora.Batch:
            if not isinstance(pred, DeviceBatch):
                return hook(self, batch, pred)
            pairs = list(zip(_single(batch), _single(pred), strict=True))
            done = _joined([hook(self, *pair) for pair in pairs])
            # Low-rank updates have so2 held below a bound in the hook, too.
            unbound = cast(Any, SimpleNamespace(use_lora=False))
            free = _joined([hook(unbound, *pair) for pair in pairs])
            return _with_decoded(done, {**free.surf_vars, **free.atmos_vars}, names)

        cast(Any, model)._post_decoder_hook = MethodType(keep, model)


class Wave(Weather):
    """AuroraWave: angles by sine and cosine, and the density, whether there is a wave at all.

    Values, sines and cosines count where there are waves; the density, between 0 and 1, at sea.
    """

    def __init__(
        self,
        variables: Variables,
        masked: Sequence[str] = (),
        *,
        densities: Sequence[str],
        angles: Sequence[str],
    ) -> None:
        super().__init__(variables, masked)
        self.absent = frozenset(densities) & frozenset(variables.surf)
        self.angles = frozenset(angles) & frozenset(variables.surf)
        self.decoded = self.absent | self.angles
        # Upstream splits the wind that drives the waves from its direction.
        derived = {"10u_wave", "10v_wave"} & set(variables.surf)
        self.reads = tuple(name for name in variables.surf if name not in derived)
        self.reads += ("dwi",) if derived else ()
        self.channels = {
            channel: name
            for name in (*variables.surf, *variables.atmos)
            for channel in self._channels(name)
        }

    def transform(self, sample: Sample, hours: float) -> Sample:
        """Splits the wind, and makes waves of no height NaN, both by upstream's own hook."""
        hook = aurora.AuroraWave.batch_transform_hook
        done = dict(sample)
        for kind in ("surf", "target_surf"):
            fields = {n: torch.as_tensor(v)[None] for n, v in sample[kind].items()}
            metadata = cast(aurora.Metadata, SimpleNamespace(rollout_step=0))
            try:
                batch = hook(cast(Any, None), aurora.Batch(fields, {}, {}, metadata))
            except AssertionError as error:
                raise DataError(
                    "waves: heights and periods must be 1e-4 or more, or NaN, wherever the height"
                    " of their kind is (swh, shww, shts, swh1, swh2); got smaller ones; set them"
                    " to NaN"
                ) from error
            done[kind] = {name: values[0].numpy() for name, values in batch.surf_vars.items()}
        return done

    def attach(self, model: aurora.Aurora) -> None:
        """See `Weather.attach`."""
        kind, names = aurora.AuroraWave, frozenset(self.channels) - {*self.variables.atmos}

        def transform(self: Any, batch: aurora.Batch) -> aurora.Batch:
            # `Wave.transform` has done it, where it waits for nothing.
            return (
                batch if isinstance(batch, DeviceBatch) else kind.batch_transform_hook(self, batch)
            )

        def keep(self: Any, batch: aurora.Batch, pred: aurora.Batch) -> aurora.Batch:
            # The hook takes channels out of the prediction.
            decoded = dict(pred.surf_vars)
            done = kind._post_decoder_hook(self, batch, pred)
            return _with_decoded(done, decoded, names)

        cast(Any, model).batch_transform_hook = MethodType(transform, model)
        cast(Any, model)._post_decoder_hook = MethodType(keep, model)

    def decoded_pairs(
        self, name: str, decoded: Mapping[str, Tensor], target: Tensor, batch: Mapping[str, Any]
    ) -> Iterator[tuple[str, Pair]]:
        """See `Weather.decoded_pairs`."""
        present = ~target.isnan()
        values = self._normalised(name, target, batch)
        known = {name: values, f"{name}_density": present.to(values.dtype)}
        known |= {f"{name}_sin": values.deg2rad().sin(), f"{name}_cos": values.deg2rad().cos()}
        for channel in self._channels(name):
            where, predicted = present, decoded[channel][:, 0]
            if channel.endswith("_density"):
                where, predicted = batch["static"]["wmb"] > 0, predicted.sigmoid()
            yield channel, Pair(predicted, known[channel], 1.0, where.expand_as(predicted))

    def _channels(self, name: str) -> list[str]:
        values = [f"{name}_sin", f"{name}_cos"] if name in self.angles else [name]
        return [*values, f"{name}_density"] if name in self.absent else values


class V1p5(Weather):
    """AuroraV1p5: insolation is computed, some variables are predicted only, some by logarithm."""

    def __init__(
        self, variables: Variables, masked: Sequence[str] = (), *, output_only: Sequence[str]
    ) -> None:
        super().__init__(variables, masked)
        self.reads = tuple(name for name in variables.surf if name != "insolation")
        self.inputs = tuple(name for name in variables.surf if name not in output_only)
        self.decoded = frozenset(n for n in variables.surf if n.startswith("scaled_"))
        self.channels.pop("insolation", None)

    def transform(self, sample: Sample, hours: float) -> Sample:
        """Leaves out the past of variables that are predicted only, and computes insolation."""
        past = {name: sample["surf"][name] for name in self.inputs if name in sample["surf"]}
        done = {**sample, "surf": past, "target_surf": dict(sample["target_surf"])}
        if "insolation" in self.inputs:
            start = datetime.fromtimestamp(int(sample["time"]), UTC).replace(tzinfo=None)
            steps = len(next(iter(sample["target_surf"].values())))
            moments = np.datetime64(start) + np.arange(-1, steps + 1) * np.timedelta64(
                round(hours * 3600), "s"
            )
            lat, lon = (np.asarray(sample[name], np.float32) for name in ("lat", "lon"))
            sun = insolation(moments, lat, lon, enforce_2d=True).astype(np.float32)
            done["surf"]["insolation"], done["target_surf"]["insolation"] = sun[:2], sun[2:]
        return done

    def attach(self, model: aurora.Aurora) -> None:
        """See `Weather.attach`."""
        self._hours = model.timestep.total_seconds() / 3600
        names, update = self.decoded, aurora.AuroraV1p5._update_insolation

        def keep(self: Any, batch: aurora.Batch, pred: aurora.Batch) -> aurora.Batch:
            return _with_decoded(pred, pred.surf_vars, names)

        def leave(self: Any, pred: aurora.Batch) -> aurora.Batch:
            # `prescribe` has it from `transform`; upstream reads the grid back for it.
            return pred if isinstance(pred, DeviceBatch) else update(self, pred)

        cast(Any, model)._post_decoder_hook = MethodType(keep, model)
        cast(Any, model)._update_insolation = MethodType(leave, model)

    def predict(self, model: nn.Module, state: DeviceBatch) -> DeviceBatch:
        """See `Weather.predict`."""
        field = next(iter(state.surf_vars.values()))
        return model(state, torch.full((len(field),), self._hours, device=field.device))

    def prescribe(
        self, predicted: DeviceBatch, targets: Mapping[str, Tensor], step: int
    ) -> DeviceBatch:
        """See `Weather.prescribe`."""
        if "insolation" not in predicted.surf_vars:
            return predicted
        sun = {"insolation": targets["insolation"][:, step : step + 1]}
        return dataclasses.replace(predicted, surf_vars={**predicted.surf_vars, **sun})

    def decoded_pairs(
        self, name: str, decoded: Mapping[str, Tensor], target: Tensor, batch: Mapping[str, Any]
    ) -> Iterator[tuple[str, Pair]]:
        """See `Weather.decoded_pairs`."""
        yield from super().decoded_pairs(name, decoded, log_transform(target), batch)


def _single(batch: aurora.Batch) -> list[aurora.Batch]:
    """Each sample as a batch: upstream's hook mixes up those of a larger one."""

    def cut(fields: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return {name: values[i : i + 1] for name, values in fields.items()}

    size = len(next(iter(batch.surf_vars.values())))
    return [
        dataclasses.replace(
            batch, surf_vars=cut(batch.surf_vars, i), atmos_vars=cut(batch.atmos_vars, i)
        )
        for i in range(size)
    ]


def _joined(batches: list[aurora.Batch]) -> aurora.Batch:
    def join(kind: str) -> dict[str, Tensor]:
        fields = [getattr(batch, kind) for batch in batches]
        return {name: torch.cat([each[name] for each in fields]) for name in fields[0]}

    return dataclasses.replace(
        batches[0], surf_vars=join("surf_vars"), atmos_vars=join("atmos_vars")
    )


def _with_decoded(
    batch: aurora.Batch, values: Mapping[str, Tensor], names: frozenset[str]
) -> aurora.Batch:
    if not isinstance(batch, DeviceBatch):
        return batch
    return dataclasses.replace(batch, decoded={name: values[name] for name in names})
