"""Batches in memory that stays, and which others may be copied there."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from fastft.task import Batch


class StaticBatches:
    """Copies of a step's batches, for a graph to read.

    Attributes:
        is_dense: whether none of their tensors is sparse or nested; others are not filled.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = [copied(batch) for batch in batches]
        self._tensors = _tensors(self._batches)
        self.is_dense = all(tensor.layout is torch.strided for tensor in self._tensors)

    @property
    def batches(self) -> list[Batch]:
        """The copies, in containers that are made anew each time."""
        return [apart(batch) for batch in self._batches]

    @torch.no_grad()
    def fill(self, batches: Sequence[Batch]) -> None:
        """Copies the values of batches of the same form."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, _tensors(batches))  # pyright: ignore[reportPrivateImportUsage]


def apart(batch: Batch) -> Batch:
    """The batch's tensors in containers of their own.

    A loss may put something into a batch, or ask for gradients of its tensors.
    """
    return dataclasses.replace(batch, data=tree_map_only(Tensor, Tensor.detach, dict(batch.data)))


def copied(batch: Batch) -> Batch:
    """A batch that a loss may write into, too."""
    return dataclasses.replace(batch, data=tree_map_only(Tensor, _copy, dict(batch.data)))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


Form = Sequence[Sequence[Any]]


def form_of(batches: Sequence[Batch]) -> Form:
    """All of a step's batches but their tensors' values and the learning rate.

    Shapes, dtypes, sizes, sources and host values: a loss may have read those.
    """
    return [_form(batch) for batch in batches]


def same_form(ours: Form, theirs: Form) -> bool:
    """Whether batches of one form may be copied to where those of the other are."""
    return len(ours) == len(theirs) and all(map(_alike, ours, theirs))


def _tensors(batches: Sequence[Batch]) -> list[Tensor]:
    leaves = tree_leaves([dict(batch.data) for batch in batches])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _form(batch: Batch) -> list[Any]:
    leaves, structure = tree_flatten(dict(batch.data))
    return [structure, batch.size, batch.source, *map(_leaf_form, leaves)]


def _leaf_form(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.dtype, leaf.shape, leaf.stride() if leaf.layout is torch.strided else leaf.layout


def _alike(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(ours: Any, theirs: Any) -> bool:
    """Whether two values are the same for certain; of arrays nobody knows."""
    if ours is theirs:
        return True
    equal = ours == theirs
    return isinstance(equal, bool | np.bool_) and bool(equal)
