"""What a task makes of a batch."""

from torch import Tensor

from fastft.task import Batch, Loss, Task


def backpropagated(task: Task, batch: Batch) -> tuple[Loss, dict[str, Tensor]]:
    """The loss, and the gradients of the parameters that have one."""
    task.model.zero_grad()
    loss = task.loss(task.model, batch)
    loss.total.backward()
    found = task.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in found if p.grad is not None}
