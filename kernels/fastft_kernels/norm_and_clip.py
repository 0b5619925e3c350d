"""`GradientNorm`: the norms of `gradient_norm`, kept between steps."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastft_kernels import gradient_norm
from fastft_kernels.device import FLOAT_DTYPES, runs_triton
from fastft_kernels.gradient_norm import launch_norms
from fastft_kernels.tensor_table import (
    ChunkTable,
    Kinds,
    addresses,
    are_at,
    dtypes,
    is_dense,
    numels,
    upload,
)


class GradientNorms(NamedTuple):
    """Everything on the device, float32; norms are those of gradient / loss_scale.

    Attributes:
        global_norm, largest, nonfinite: 0-dim; L2 norm, largest magnitude, count of NaN and inf.
        tensor_norms, tensor_largest: `[tensors]`; 0 where a gradient is None.
        group_norms: `[groups]`.
        clip_coefficient, grad_divisor: 0-dim; grad_divisor = loss_scale / clip_coefficient is what
            `FusedAdam.step` takes.
        skip: 0-dim; 1 where a gradient is not finite.
    """

    global_norm: Tensor
    largest: Tensor
    nonfinite: Tensor
    tensor_norms: Tensor
    tensor_largest: Tensor
    group_norms: Tensor
    clip_coefficient: Tensor
    grad_divisor: Tensor
    skip: Tensor


@dataclass(frozen=True)
class ZClip:
    """Clips by the z-score of the norm against a moving mean and variance of past norms.

    Args:
        decay: of the moving mean and variance.
        z_limit: norms beyond this many standard deviations are clipped.
        warmup: steps that only collect the mean and variance.
    """

    decay: float = 0.97
    z_limit: float = 2.5
    warmup: int = 25

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ZClip: decay must be in [0, 1); got {self.decay}")
        if not self.z_limit > 0:
            raise ValueError(f"ZClip: z_limit must be above 0; got {self.z_limit}")
        if self.warmup < 1:
            # From a mean of 0 every norm is a spike, for ever.
            raise ValueError(f"ZClip: warmup must be 1 or more; got {self.warmup}")


class _Plan:
    """Tables for a list of gradients with fixed sizes, dtypes and groups."""

    def __init__(
        self, numels: list[int], kinds: Sequence[tuple], groups: list[int], device: torch.device
    ) -> None:
        count, group_count = len(numels), max(groups, default=-1) + 1
        # Chunks in the order of groups make every group one stretch of partial sums.
        order = sorted(range(count), key=groups.__getitem__)
        self.chunks = ChunkTable(numels, gradient_norm.CHUNK, device, order)
        self.kinds = Kinds(kinds, device)
        self.moved_bytes = sum(n * kind[0].itemsize for n, kind in zip(numels, kinds, strict=True))
        tensors: list[list[int]] = [[0, 0] for _ in range(count)]
        in_group: list[list[int]] = [[0, 0] for _ in range(group_count)]
        end = 0
        for i, chunks in zip(order, self.chunks.counts, strict=True):
            tensors[i] = [end, end + chunks]
            stretch = in_group[groups[i]]
            stretch[0] = stretch[0] if stretch[1] else end
            end += chunks
            stretch[1] = end
        self.segments = upload([*tensors, *in_group, [0, end]], torch.int32, device)
        self.grads = torch.zeros(count, dtype=torch.int64, device=device)


class GradientNorm:
    """Norms of a model's gradients, and how much to clip them; the tables live between calls.

    Args:
        group_ids: the group of each gradient, from 0; one group without it.
        max_norm: the clipping threshold; None leaves the threshold to zclip, or nothing clipped.
        zclip: adaptive clipping on top.
    """

    def __init__(
        self,
        group_ids: Sequence[int] | None = None,
        *,
        max_norm: float | None = None,
        zclip: ZClip | None = None,
    ) -> None:
        self.group_ids = None if group_ids is None else list(group_ids)
        if self.group_ids and min(self.group_ids) < 0:
            raise ValueError(
                f"GradientNorm: group_ids must be 0 or more; got {min(self.group_ids)}; number the"
                " groups from 0"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(
                f"GradientNorm: max_norm must be above 0; got {max_norm}; None clips nothing"
            )
        self.max_norm = float("inf") if max_norm is None else max_norm
        self.zclip = zclip
        self.state: Tensor | None = None
        self._constants: tuple[Tensor, Tensor] | None = None
        self._plan: _Plan | None = None
        self._sizes: tuple = ()
        self._addresses: list[int] = []

    def __call__(
        self, grads: Sequence[Tensor | None], loss_scale: Tensor | None = None
    ) -> GradientNorms:
        """Norms of grads, in their order; a missing gradient counts as zero.

        Args:
            grads: on one device, dense, in float32, bfloat16 or float16.
            loss_scale: 0-dim float32 on the device; what the loss was multiplied by.
        """
        groups = [0] * len(grads) if self.group_ids is None else self.group_ids
        if len(groups) != len(grads):
            raise ValueError(
                f"GradientNorm: one group id per gradient; got {len(groups)} for {len(grads)}"
            )
        present = [g for g in grads if g is not None]
        if not present:
            raise ValueError("GradientNorm: at least one gradient must exist; got none")
        device = present[0].device
        if self.state is None or self._constants is None:
            _check(present)
            state = torch.zeros(3) if self.state is None else self.state
            self.state = state.to(device)
            self._constants = (
                torch.full((), self.max_norm, device=device),
                torch.ones((), device=device),
            )
        max_norm, one = self._constants
        scale = one if loss_scale is None else loss_scale
        outputs = [torch.empty(n, device=device) for n in (*[len(grads) + max(groups) + 2] * 2, 4)]
        if runs_triton(present[0]):
            self._launch(list(grads), present, groups, scale, max_norm, outputs)
        else:
            self._run_on_cpu(grads, groups, float(scale), outputs)
        return _named(outputs, len(grads))

    def state_dict(self) -> dict[str, Tensor]:
        """ZClip's mean, variance and steps."""
        return {"zclip": torch.zeros(3) if self.state is None else self.state.clone()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Goes on from what `state_dict` returned."""
        self.state, self._constants = state_dict["zclip"].clone(), None

    def _launch(self, grads, present, groups, scale, max_norm, outputs) -> None:
        if not all(map(Tensor.is_contiguous, present)):
            grads = [g if g is None or is_dense(g) else g.contiguous() for g in grads]
        plan = self._refreshed_plan(grads, groups, scale.device)
        zclip = None
        if self.zclip is not None and self.state is not None:
            zclip = (self.zclip.decay, self.zclip.z_limit, self.zclip.warmup, self.state)
        launch_norms(
            *(plan.chunks, plan.kinds, plan.grads, plan.segments, plan.moved_bytes),
            *(scale, max_norm, zclip, outputs),
        )

    def _refreshed_plan(self, grads: list[Tensor | None], groups: list[int], device) -> _Plan:
        """Tables for these gradients; an address alone would not tell a new tensor from an old."""
        sizes = (numels(grads), dtypes(grads))
        if self._plan is not None and sizes == self._sizes and are_at(grads, self._addresses):
            return self._plan
        self._addresses = addresses(grads)
        kinds = tuple(
            (dtype or torch.float32, address & 15 == 0)
            for dtype, address in zip(sizes[1], self._addresses, strict=True)
        )
        plan = self._plan
        if plan is None or sizes[0] != self._sizes[0] or kinds != plan.kinds.of:
            _check([g for g in grads if g is not None])
            self._plan = plan = _Plan(sizes[0], kinds, groups, device)
        self._sizes = sizes
        upload(self._addresses, torch.int64, device, into=plan.grads)
        return plan

    def _run_on_cpu(self, grads, groups, scale: float, outputs) -> None:
        norms, largest, control = outputs
        squares = torch.zeros(len(norms), dtype=torch.float64)
        largest.zero_()
        nonfinite = 0
        for i, g in enumerate(grads):
            if g is None or not g.numel():
                continue
            wide = g.double().abs()
            nonfinite += int((~wide.isfinite()).sum())
            top = wide.nan_to_num(torch.inf, torch.inf).max()
            for slot in (i, len(grads) + groups[i], -1):
                squares[slot] += wide.square().sum()
                largest[slot] = max(largest[slot], top / scale)
        norms.copy_(squares.sqrt() / scale)
        norm = float(norms[-1])
        finite = nonfinite == 0 and norm < float("inf")
        coefficient = self._clip_on_cpu(norm) if finite else 1.0
        control.copy_(torch.tensor([nonfinite, coefficient, scale / coefficient, not finite]))

    def _clip_on_cpu(self, norm: float) -> float:
        threshold = self.max_norm
        if self.zclip is not None and self.state is not None:
            mean, variance, steps = self.state.tolist()
            warm = steps >= self.zclip.warmup
            deviation = variance**0.5 + 1e-6
            z = (norm - mean) / deviation
            if warm and z > self.zclip.z_limit:
                threshold = min(threshold, mean + self.zclip.z_limit**2 / z * deviation)
            kept = min(norm, threshold)
            rate = 1 - self.zclip.decay if warm else 1 / (steps + 1)
            new_mean = mean + rate * (kept - mean)
            spread = (kept - new_mean) * (kept - (new_mean if warm else mean))
            self.state.copy_(
                torch.tensor([new_mean, variance + rate * (spread - variance), steps + 1])
            )
        return min(1.0, threshold / (norm + 1e-6))


def _check(grads: Sequence[Tensor]) -> None:
    for g in grads:
        if g.layout != torch.strided or g.dtype not in FLOAT_DTYPES:
            kind = "a sparse one" if g.layout != torch.strided else g.dtype
            raise ValueError(
                "GradientNorm: gradients must be dense float32, bfloat16 or float16; got"
                f" {kind}; use torch.nn.utils.get_total_norm for these"
            )


def _named(outputs: Sequence[Tensor], count: int) -> GradientNorms:
    norms, largest, control = outputs
    return GradientNorms(
        global_norm=norms[-1],
        largest=largest[-1],
        nonfinite=control[0],
        tensor_norms=norms[:count],
        tensor_largest=largest[:count],
        group_norms=norms[count:-1],
        clip_coefficient=control[1],
        grad_divisor=control[2],
        skip=control[3],
    )


@functools.lru_cache(maxsize=16)
def _shared(group_ids: tuple[int, ...], max_norm: float, device: torch.device) -> GradientNorm:
    return GradientNorm(group_ids, max_norm=max_norm)


@torch.library.custom_op("fastft::gradient_norms", mutates_args=())
def _gradient_norms(
    grads: Sequence[Tensor], group_ids: Sequence[int], max_norm: float, loss_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(norms, largest, control): per tensor, per group, over all; control as in `_named`."""
    norm = _shared(tuple(group_ids), max_norm, grads[0].device)
    result = norm(list(grads), loss_scale)
    tail = [result.nonfinite, result.clip_coefficient, result.grad_divisor, result.skip]
    norms = torch.cat([result.tensor_norms, result.group_norms, result.global_norm[None]])
    largest = torch.cat([result.tensor_largest, result.largest[None]])
    return norms, largest, torch.stack(tail)


@_gradient_norms.register_fake
def _gradient_norms_fake(grads, group_ids, max_norm, loss_scale):
    count = len(grads)
    sizes = (count + max(group_ids) + 2, count + 1, 4)
    return tuple(grads[0].new_empty(n, dtype=torch.float32) for n in sizes)


def gradient_norms(
    grads: Sequence[Tensor],
    group_ids: Sequence[int] | None = None,
    *,
    max_norm: float | None = None,
    loss_scale: Tensor | None = None,
) -> GradientNorms:
    """`GradientNorm` as one function, for use inside a compiled graph; see there."""
    groups = [0] * len(grads) if group_ids is None else list(group_ids)
    limit = float("inf") if max_norm is None else max_norm
    return _named(_gradient_norms(list(grads), groups, limit, loss_scale), len(grads))
