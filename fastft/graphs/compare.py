"""What a captured step gives beside an uncaptured one."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from fastft.gradients import gradients_of
from fastft.graphs.inputs import copied
from fastft.step import TrainingStep, mean_loss
from fastft.task import Batch, Loss

# What sums in no fixed order may change.
_TOLERANCE = 1e-3

ForwardBackward = Callable[[Sequence[Batch]], Sequence[Loss]]


def difference(
    step: TrainingStep, steps: Sequence[Sequence[Batch]], total: int, replay: ForwardBackward
) -> str | None:
    """What the captured step changes, None where that is nothing.

    Args:
        steps: the batches of two steps.
        total: steps of the run, over which the learning rate changes.
        replay: does what `step.forward_backward` does.
    """
    ours, theirs = (_outcomes(step, steps, total, run) for run in (step.forward_backward, replay))
    return first_difference(ours, theirs)


def _outcomes(
    step: TrainingStep, steps: Sequence[Sequence[Batch]], total: int, run: ForwardBackward
) -> list[dict[str, float]]:
    """Of three in a row from the same random numbers, at three learning rates."""
    turns = ((0, steps[0]), (total // 2, steps[1]), (total - 1, steps[0]))
    with step.rehearsal():
        return [_values(step, run, index, batches) for index, batches in turns]


def _values(
    step: TrainingStep, run: ForwardBackward, index: int, batches: Sequence[Batch]
) -> dict[str, float]:
    factor = step.optimizer.lr_factor(index)
    # Copies, because the run's next step may be on these batches.
    batches = [dataclasses.replace(copied(batch), lr_factor=factor) for batch in batches]
    loss = mean_loss(run(batches))
    verdict = step.guard.inspect(gradients_of(list(step.optimizer.parameters.values())))
    step.optimizer.zero_grad()
    norms = zip(step.guard.names, verdict.tensor_norms.tolist(), strict=True)
    return {
        "the loss": loss.total.item(),
        **{f"the loss's part '{name}'": part.item() for name, part in loss.parts.items()},
        _NORM: verdict.norm.item(),
        **{f"{_OF_ONE} '{name}'": norm for name, norm in norms},
    }


_NORM, _OF_ONE = "the gradients' norm", "the gradient of"


def first_difference(
    plain: Sequence[Mapping[str, float]], replayed: Sequence[Mapping[str, float]]
) -> str | None:
    """The first value that differs by more than rounding.

    A single gradient may be nothing but rounding: it is compared by the norm of all of them.
    """
    for ours, theirs in zip(plain, replayed, strict=True):
        norm = ours[_NORM] if math.isfinite(ours[_NORM]) else 0.0
        for name in {**ours, **theirs}:
            if name not in ours or name not in theirs:
                return name
            a, b = ours[name], theirs[name]
            scale = norm if name.startswith(_OF_ONE) else 0.0
            close = math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE * scale)
            if not close and not (math.isnan(a) and math.isnan(b)):
                return name
    return None
