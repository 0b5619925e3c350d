"""One optimizer step as one callable: autocast, loss, backward, norm, clip, update.

Nothing in it waits for the device: what it returns are device scalars, which the loop reads at its
log points only.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastft.blocks import running_statistics
from fastft.config import GradientsConfig
from fastft.errors import ConfigError
from fastft.fused import TORCH_ONLY, Kernels
from fastft.gradients import GradientGuard, NormSummary, Verdict, gradients_of
from fastft.optim import Optimizer
from fastft.precision import Precision
from fastft.replay import ReplayBuffer
from fastft.runtime import rng_state, set_rng_state
from fastft.task import Batch, Loss, LossFunction, Task


def compute_loss(loss: LossFunction, model: nn.Module, batch: Batch, precision: Precision) -> Loss:
    """The loss of one batch under the run's precision."""
    with precision.autocast():
        return loss(model, batch)


@dataclass(frozen=True)
class StepResult:
    """What one step leaves on the device.

    Attributes:
        loss: mean over the micro-batches.
        parts: the loss's parts, likewise.
        verdict: norms, and whether the update was skipped.
    """

    loss: Tensor
    parts: Mapping[str, Tensor]
    verdict: Verdict


class Graph(Protocol):
    """Forward and backward of all micro-batches of a step as one launch; see `fastft.graphs`."""

    def takes(self, batches: Sequence[Batch], /) -> bool:
        """Whether there is a graph for such batches; it may be captured here."""
        ...

    def replay(self, batches: Sequence[Batch], /) -> Sequence[Loss]:
        """What `TrainingStep.forward_backward` does; its losses are overwritten by the next."""
        ...


class TrainingStep:
    """`step(index, batches) -> StepResult`: accumulates over the batches, then updates once.

    Args:
        task: model and loss, on the device.
        optimizer: over the trained parameters.
        penalty: the run file's terms on parameters, or None.
        kernels: whether gradients are measured by fastft's kernel.
        replay: where batches draw from a replay buffer.

    Attributes:
        graph: runs forward and backward where it takes the batches; None: nothing was captured.
    """

    graph: Graph | None = None

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        penalty: Callable[[], Tensor] | None,
        gradients: GradientsConfig,
        precision: Precision,
        kernels: Kernels = TORCH_ONLY,
        replay: ReplayBuffer | None = None,
    ) -> None:
        self.task = task
        self.replay = replay
        self.precision = precision
        self.optimizer = optimizer
        self._penalty = penalty
        names = list(optimizer.parameters)
        self._parameters = list(optimizer.parameters.values())
        self._untouched = list(range(len(names)))
        scaled = precision.name == "fp16"
        self.statistics = running_statistics(task.model)
        self._kept = [torch.empty_like(buffer) for buffer in self.statistics.values()]
        self.guard = GradientGuard(
            names, gradients, precision.device, scaled=scaled, fused=kernels.norm
        )
        self.summary = NormSummary(names, optimizer.groups, task)
        self._rehearsing = False

    def __call__(self, index: int, batches: Sequence[Batch]) -> StepResult:
        """Runs step `index` (0-based) on micro-batches that are on the device."""
        statistics = list(self.statistics.values())
        if statistics:
            torch._foreach_copy_(self._kept, statistics)  # pyright: ignore[reportPrivateImportUsage]
        factor = self.optimizer.lr_factor(index)
        batches = [dataclasses.replace(batch, lr_factor=factor) for batch in batches]
        if self.graph is not None and self.graph.takes(batches):
            with record_function("fastft/graph"):
                losses = self.graph.replay(batches)
        else:
            losses = self.forward_backward(batches)
        mean = mean_loss(losses)
        total, parts = mean.total, dict(mean.parts)
        if self._penalty is not None:
            penalty = self._penalty()
            if penalty.requires_grad:
                (penalty * self.guard.scale).backward()
            parts["penalty"] = penalty.detach()
            total = total + parts["penalty"]
        gradients = gradients_of(self._parameters)
        if all(gradient is None for gradient in gradients):
            raise ConfigError(
                f"loss: must depend on a trained parameter; at step {index + 1} it depends on none;"
                " train what the loss uses (finetune.method, freeze, unfreeze)"
            )
        self._untouched = [i for i in self._untouched if gradients[i] is None]
        with record_function("fastft/gradients"):
            verdict = self.guard.inspect(gradients)
        if self._rehearsing:
            verdict = dataclasses.replace(verdict, skip=torch.ones_like(verdict.skip))
        with record_function("fastft/update"):
            # A skipped step must leave the running statistics as they were, too.
            undo = verdict.skip > 0
            for buffer, old in zip(statistics, self._kept, strict=True):
                torch.where(undo, old, buffer, out=buffer)
            self.optimizer.update(index, verdict.divisor, verdict.skip)
            self.optimizer.zero_grad()
        return StepResult(total, parts, verdict)

    def forward_backward(self, batches: Sequence[Batch]) -> list[Loss]:
        """The detached loss of each micro-batch; leaves their gradients' sum in the parameters."""
        return [self._forward_backward(batch, len(batches)) for batch in batches]

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps in this context are whole ones, and leave everything as it was before them.

        Of the model that is its buffers, and numbers, text and None among its modules' attributes;
        it may hold new attributes after it, and the optimizer fresh state (`Optimizer.forget`).
        """
        device = self.precision.device
        generators = rng_state(device)
        restore = [_memory_of(module) for module in self.task.model.modules()]
        untouched, outer = self._untouched, self._rehearsing
        self._rehearsing = True
        try:
            with self.guard.unchanged():
                yield
        finally:
            self._untouched, self._rehearsing = untouched, outer
            self.optimizer.zero_grad()
            for module in restore:
                module()
            set_rng_state(generators, device)

    def update_ratios(self) -> dict[str, Tensor]:
        """'group/<name>' and 'layer/<name>' -> L2 norm of the last update over the weights'.

        Empty where the optimizer does not measure its updates (see `Optimizer.update_norms`).
        """
        found = self.optimizer.update_norms()
        if not found:
            return {}
        none = (torch.zeros((), device=self.precision.device),) * 2
        pairs = [found.get(name, none) for name in self.guard.names]
        update, weight = (self.summary(torch.stack(norms)) for norms in zip(*pairs, strict=True))
        return {name: update[name] / weight[name].clamp(min=1e-8) for name in update}

    def untouched_names(self) -> list[str]:
        """Parameters that should be trained but had no gradient in any step so far."""
        waiting = [i for i in self._untouched if self._parameters[i].requires_grad]
        return [self.guard.names[i] for i in waiting]

    def _forward_backward(self, batch: Batch, of: int) -> Loss:
        replay = None if self._rehearsing else self.replay
        with record_function("fastft/forward"):
            batch = batch if replay is None else replay.fill(batch)
            loss = compute_loss(self.task.loss, self.task.model, batch, self.precision)
            if replay is not None:
                replay.keep(batch, loss.predictions)
        if loss.total.requires_grad:
            with record_function("fastft/backward"):
                (loss.total * (self.guard.scale / of)).backward()
        parts = {name: part.detach() for name, part in loss.parts.items()}
        return Loss(loss.total.detach(), parts)


def _memory_of(module: nn.Module) -> Callable[[], None]:
    """What puts a module's own buffers and plain attributes back as they are now."""
    buffers = {
        # On the CPU: a copy on the device would count in what a rehearsal measures.
        name: (buffer, None if buffer is None else _once(buffer).to("cpu", copy=True))
        for name, buffer in module._buffers.items()
    }
    # A buffer may come with a number that says what it holds, such as the length of a cache.
    plain = {n: value for n, value in vars(module).items() if isinstance(value, _PLAIN)}

    @torch.no_grad()
    def restore() -> None:
        for name, (buffer, old) in buffers.items():
            if buffer is not None and old is not None:
                _once(buffer).copy_(old)
            if module._buffers.get(name) is not buffer:
                setattr(module, name, buffer)
        for name, value in plain.items():
            if vars(module).get(name) is not value:
                setattr(module, name, value)

    return restore


_PLAIN = (int, float, str, type(None))


def _once(buffer: Tensor) -> Tensor:
    """The part of an expanded tensor that its other elements repeat."""
    if buffer.layout is not torch.strided:
        return buffer
    for dimension, stride in enumerate(buffer.stride()):
        if stride == 0:
            buffer = buffer.narrow(dimension, 0, min(1, buffer.shape[dimension]))
    return buffer


def mean_loss(losses: Sequence[Loss]) -> Loss:
    """The mean over micro-batches; those of different data sets may have different parts."""
    names = dict.fromkeys(name for loss in losses for name in loss.parts)
    parts = {n: _mean([x.parts[n] for x in losses if n in x.parts]) for n in names}
    return Loss(_mean([loss.total for loss in losses]), parts)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


class Ema:
    """Exponential moving average of the trained parameters.

    The decay of step t is `min(decay, (1 + t) / (10 + t))`: early averages forget the start.

    Args:
        parameters: by name; the average starts from their current values.
        decay: share of the average kept per step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._decay = decay
        self._parameters = dict(parameters)
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, index: int) -> None:
        """Moves the average towards the weights after step `index`."""
        decay = min(self._decay, (1 + index) / (10 + index))
        averages, weights = list(self.average.values()), list(self._parameters.values())
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the average inside this context, its own weights again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)
