"""A captured step, and what may not be captured."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastft.gradients import gradients_of
from fastft.graphs.inputs import StaticBatches
from fastft.graphs.record import NotCaptured, Outputs, Record
from fastft.runtime import rng_state
from fastft.step import TrainingStep
from fastft.task import Batch, Loss


class StepGraph:
    """The captured forward and backward of a step.

    Args:
        inputs: the batches to capture with; the graph is their owner from then on.
        record: captures.

    Raises:
        NotCaptured: with the reason.
    """

    def __init__(self, step: TrainingStep, inputs: StaticBatches, record: Record) -> None:
        if not inputs.is_dense:
            raise NotCaptured("batches hold sparse or nested tensors")
        self._inputs = inputs
        self._parameters = list(step.optimizer.parameters.values())

        def run() -> Outputs:
            losses = step.forward_backward(inputs.batches)
            gradients = gradients_of(self._parameters)
            step.optimizer.zero_grad()
            return losses, gradients

        with step.rehearsal():
            # What a model makes in its first forward pass is no change.
            run()
            before = host_state(step)
            run()
            changed = first_change(before, host_state(step))
            if changed is not None:
                raise NotCaptured(f"each step changes {changed}, which a graph would not")
            self._replay, (self._losses, self._gradients) = record(run, step.precision.device)
            # The graph reads them, even where the model replaces them later.
            self._kept = _module_tensors(step.task.model)

    def replay(self, batches: Sequence[Batch]) -> Sequence[Loss]:
        """Forward and backward of batches of the inputs' form; the next overwrites its losses."""
        self._inputs.fill(batches)
        self._replay()
        # The update has dropped them.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._losses


def host_state(step: TrainingStep) -> dict[str, Any]:
    """What a step may change on the host: numbers, text and buffers of modules, generators."""
    state: dict[str, Any] = {}
    for prefix, module in step.task.model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
        for name, value in {**plain, **module._buffers}.items():
            state[f"'{prefix}.{name}'" if prefix else f"'{name}'"] = value
    random = rng_state(step.precision.device)
    state["torch's random numbers on the host"] = random["torch"].tolist()
    state["numpy's random numbers"] = random["numpy"]
    state["Python's random numbers"] = random["python"]
    return state


def first_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first name whose value is another; of tensors, which are filled in place, another one."""
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        replaced = isinstance(old, Tensor) or isinstance(new, Tensor)
        if old is not new and (replaced or old != new):
            return name
    return None


def _module_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor among the attributes of the modules, in containers too."""
    leaves = tree_leaves([dict(vars(module)) for module in model.modules()])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
