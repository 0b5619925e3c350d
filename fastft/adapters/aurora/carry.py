"""Predictions as the data of later steps, for a replay buffer (`fastft.task.Carry`)."""

import dataclasses
from collections.abc import Mapping, Sequence

import aurora
import torch
from torch import Tensor

from fastft.adapters.aurora.batch import first_state
from fastft.adapters.aurora.forward import constant
from fastft.adapters.aurora.variants import Weather
from fastft.task import Batch

# 'surf' and 'atmos' -> name -> the last two steps, `[2, (C,) H, W]`.
State = Mapping[str, Mapping[str, Tensor]]


class AuroraCarry:
    """A sample's state is its history, whose last step is what the model predicted.

    Where a prediction is not finite, the data take its place: one bad step does not spoil a sample
    for good.

    Attributes:
        longest: see `fastft.task.Carry`.
    """

    def __init__(self, model: aurora.Aurora, variant: Weather, longest: int | None) -> None:
        self._model, self._variant, self.longest = model, variant, longest

    def start(self, batch: Batch, states: Sequence[State | None], /) -> Batch:
        """See `fastft.task.Carry`."""
        if all(state is None for state in states):
            return batch
        data = dict(batch.data)
        for kind in ("surf", "atmos"):
            data[kind] = {
                name: torch.stack(
                    [
                        own if state is None else state[kind][name]
                        for own, state in zip(values, states, strict=True)
                    ]
                )
                for name, values in data[kind].items()
            }
        return dataclasses.replace(batch, data=data)

    def states(self, batch: Batch, predictions: Mapping[str, Tensor], /) -> list[State]:
        """See `fastft.task.Carry`."""
        names = {"surf": self._variant.inputs, "atmos": self._variant.variables.atmos}
        fields = {kind: {n: predictions[n][:, :1] for n in names[kind]} for kind in names}
        start = first_state(batch.data)
        predicted = dataclasses.replace(start, surf_vars=fields["surf"], atmos_vars=fields["atmos"])
        predicted = self._model.apply_rollout_input_clipping(predicted)
        newest = {**predicted.surf_vars, **predicted.atmos_vars}
        histories = {
            kind: {
                name: torch.cat(
                    [batch[kind][name][:, 1:], self._finite(name, newest[name], batch)], 1
                )
                for name in names[kind]
            }
            for kind in names
        }
        return [
            {kind: {n: v[i] for n, v in each.items()} for kind, each in histories.items()}
            for i in range(batch.size)
        ]

    def _finite(self, name: str, values: Tensor, batch: Batch) -> Tensor:
        if name in self._variant.absent:
            # NaN says that there are no waves.
            return values
        data = batch[name][:, :1]
        if name in self._variant.masked:
            location = self._variant.variables.location(name, batch["levels"])
            data = torch.where(data.isnan(), constant(location, data.dtype, data.device), data)
        return torch.where(values.isfinite(), values, data)
