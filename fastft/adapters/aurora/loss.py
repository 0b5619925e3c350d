"""The paper's loss, over one step or a roll-out.

Bodnar et al. 2024 (arXiv 2405.13063), Supplement D:

    L = gamma / (V_S + V_A) * (alpha * sum_k w_k mean|dS_k| + beta * sum_k w_k mean|dA_k|)

with the differences d of normalised variables, means over all points and levels, and V_S and V_A
the numbers of surface and atmospheric variables. Points are not weighted by their area. Where a
masked variable's target is NaN, the point does not count in its mean; a batch without any target
of the variable gives 0.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import aurora
import torch

# Private, but the step of upstream's own roll-out; the package's version is pinned.
from aurora.rollout import _advance_batch
from torch import Tensor, nn

from fastft.adapters.aurora.batch import first_state
from fastft.adapters.aurora.forward import DeviceBatch, constant
from fastft.adapters.aurora.options import LOSS_WEIGHTS, AuroraLossOptions
from fastft.adapters.aurora.variants import Pair, Weather
from fastft.errors import ConfigError, nearest
from fastft.task import Batch, Loss


class AuroraLoss:
    """Rolls the model out over a batch's targets.

    The total is the mean over the steps, with gradients through all of them, or with `pushforward`
    that of the last step. `parts` are the normalised errors of each variable, unweighted; over
    several steps also each step's loss, 'step-2'.

    Args:
        options: weights.
        variant: of the run's class, with its variables.
        clip: the model's, of predictions before they are the next step's input.
        told_step: what the model is told of the number of a roll-out step.

    Raises:
        ConfigError: a weight of a variable that the run does not have, or one below 0.
    """

    def __init__(
        self,
        options: AuroraLossOptions,
        variant: Weather,
        *,
        clip: Callable[[aurora.Batch], aurora.Batch],
        told_step: Callable[[int], int],
    ) -> None:
        self._variant, self._clip, self._told_step = variant, clip, told_step
        self._pushforward = options.pushforward
        channels, surface = variant.channels, variant.variables.surf
        self._targets = (*variant.targets, *variant.variables.atmos)
        predicted = list(dict.fromkeys([*channels.values(), *channels]))
        problems = [
            f"model.options.loss.weights: '{name}' must be a predicted variable; it is"
            f" none{nearest(name, predicted)}"
            for name in options.weights
            if name not in predicted
        ]
        problems += [
            f"model.options.loss.weights.{name}: must be 0 or more; got {weight}; correct it"
            for name, weight in options.weights.items()
            if not weight >= 0
        ]
        if problems:
            raise ConfigError(problems)
        weights = {**LOSS_WEIGHTS[options.preset], **options.weights}
        factor = options.gamma / len(channels)
        self._coefficients = {
            channel: factor
            * (options.alpha if name in surface else options.beta)
            * weights.get(channel, weights.get(name, 1.0))
            for channel, name in channels.items()
        }

    def __call__(self, model: nn.Module, batch: Batch, /) -> Loss:
        """The loss.

        Predictions, in physical units, only without gradients, as in evaluations, and of samples
        from a replay buffer.
        """
        targets = {name: batch[name] for name in self._targets}
        steps = next(iter(targets.values())).shape[1]
        numbers = self._step_numbers(batch.leads or (0,), steps)
        state = first_state(batch.data, numbers[0])
        kept = not torch.is_grad_enabled() or bool(batch.leads)
        totals: list[Tensor] = []
        errors: list[dict[str, Tensor]] = []
        predictions: list[dict[str, Tensor]] = []
        for step in range(steps):
            last = step == steps - 1
            with torch.no_grad() if self._pushforward and not last else contextlib.nullcontext():
                predicted = self._variant.predict(model, state)
                predicted = self._variant.prescribe(predicted, targets, step)
                values = {**predicted.surf_vars, **predicted.atmos_vars}
                error = self._errors(predicted, batch.data, step)
                totals.append(self._total(error))
                if not last:
                    state = self._next(state, predicted, numbers[step + 1])
            errors.append({name: value.detach() for name, value in error.items()})
            if kept:
                predictions.append({name: value.detach() for name, value in values.items()})
        total = totals[-1] if self._pushforward else torch.stack(totals).mean()
        parts = {name: torch.stack([e[name] for e in errors]).mean() for name in errors[0]}
        if steps > 1:
            parts |= {f"step-{i + 1}": value.detach() for i, value in enumerate(totals)}
        return Loss(total, parts, _joined(predictions) if kept else None)

    def _step_numbers(self, leads: tuple[int, ...], steps: int) -> list[int]:
        """What the model is told of each step's number."""
        told = [{self._told_step(lead + step) for lead in leads} for step in range(steps)]
        if any(len(numbers) > 1 for numbers in told):
            raise ConfigError(
                "data.replay: samples of a batch must be carried on equally far, since the model"
                f" depends on the roll-out step; got {', '.join(map(str, leads))} steps; set"
                " data.batch_size = 1 (and step.accumulate)"
            )
        return [numbers.pop() for numbers in told]

    def _errors(
        self, predicted: DeviceBatch, batch: Mapping[str, Any], step: int
    ) -> dict[str, Tensor]:
        """Mean absolute errors of normalised variables."""
        errors = {}
        for channel, pair in self._variant.pairs(predicted, batch, step):
            if isinstance(pair.scale, float):
                errors[channel] = _mean(pair, (0, 1, 2)) / pair.scale
            else:
                by_level = _mean(pair, (0, 2, 3))
                scale = constant(pair.scale, by_level.dtype, by_level.device)
                errors[channel] = (by_level / scale).mean()
        return errors

    def _total(self, errors: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self._coefficients[n] * error for n, error in errors.items()]).sum()

    def _next(self, state: Any, predicted: Any, number: int) -> Any:
        """The next step's input, as `aurora.rollout` makes it."""
        state = _advance_batch(state, self._clip(predicted))
        metadata = dataclasses.replace(state.metadata, rollout_step=number)
        return dataclasses.replace(state, metadata=metadata)


def _mean(pair: Pair, over: tuple[int, ...]) -> Tensor:
    """Mean absolute difference over some dimensions; those that are left count by points."""
    difference = pair.predicted - pair.target
    if pair.present is None:
        return difference.abs().mean(over)
    # Before the absolute value, whose gradient would be NaN times 0.
    total = torch.where(pair.present, difference, 0).abs().sum(over)
    # Over the mean number of points: the mean over levels is then that over all points.
    return total / pair.present.sum(over).to(total.dtype).mean().clamp(min=1e-6)


def _joined(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each variable's predictions as `[B, R, ...]`."""
    if len(steps) == 1:
        return steps[0]
    return {name: torch.cat([values[name] for values in steps], 1) for name in steps[0]}
