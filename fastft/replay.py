"""The replay buffer: what the model made of samples, kept for the next time they are drawn.

`fastft.data.replay` says which slots a batch draws. Nothing here waits for the device: states go to
page-locked memory and come back in the order of the stream.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastft.task import Batch, Carry


class ReplayBuffer:
    """The states of slots, on the host.

    Args:
        carry: of the task.
        device: of the model.
        saved: whether checkpoints hold the states.
    """

    def __init__(self, carry: Carry, device: torch.device, *, saved: bool) -> None:
        self._carry, self._device, self._saved = carry, device, saved
        # Slot -> steps that its sample was carried on, and its state.
        self._slots: dict[int, tuple[int, Any]] = {}

    def fill(self, batch: Batch) -> Batch:
        """The batch with what its samples have become; where that is not known, with data."""
        states = []
        for slot, lead in zip(batch.slots, batch.leads, strict=True):
            at, state = self._slots.get(slot, (0, None))
            states.append(_copied(state, self._device) if lead and at == lead else None)
        return self._carry.start(batch, states)

    def keep(self, batch: Batch, predictions: Any) -> None:
        """Keeps what the samples have become."""
        states = self._carry.states(batch, predictions)
        for slot, lead, state in zip(batch.slots, batch.leads, states, strict=True):
            self._slots[slot] = lead + 1, _copied(state, torch.device("cpu"))

    def state_dict(self) -> dict[str, Any]:
        """Slots with their states; empty where they are not saved."""
        if not self._saved:
            return {}
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return {str(slot): [lead, state] for slot, (lead, state) in self._slots.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self._slots = {int(slot): (lead, fields) for slot, (lead, fields) in state.items()}


def _copied(state: Any, device: torch.device) -> Any:
    """A copy, so that no view takes its whole batch along."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True, copy=True)

    return tree_map_only(Tensor, copy, state)
