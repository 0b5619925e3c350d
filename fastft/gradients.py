"""Watching gradients: norms, clipping, and what happens to a bad step, decided on the device."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from fastft_kernels import GradientNorm, ZClip
from torch import Tensor, nn

from fastft.config import GradientsConfig
from fastft.optim import Group
from fastft.task import Task

_GROWTH_INTERVAL = 2000
_FIRST_SCALE = 2.0**16


@dataclass(frozen=True)
class Verdict:
    """What the guard says of one step's gradients; all on the device.

    Attributes:
        norm: global L2 norm, unscaled, before clipping.
        tensor_norms: L2 norm of each parameter's gradient, 0 where there is none; `[parameters]`.
        divisor: what the optimizer divides the gradients by: loss scale over clip coefficient.
        skip: 1 where the update must change nothing.
    """

    norm: Tensor
    tensor_norms: Tensor
    divisor: Tensor
    skip: Tensor


class GradientGuard:
    """Norms, clip coefficient, loss scale and bad-step counters, without a wait for the device.

    The loss scale follows torch's GradScaler: halved after an overflow, doubled after 2000 good
    steps (Micikevicius et al. 2018, arXiv 1710.03740).

    Args:
        names: of the parameters, in the order of `inspect`'s gradients.
        config: the run file's `[gradients]`.
        scaled: whether the loss is scaled, as fp16 needs.
        fused: measure with fastft's kernel; ZClip needs it.
    """

    def __init__(
        self,
        names: Sequence[str],
        config: GradientsConfig,
        device: torch.device,
        *,
        scaled: bool,
        fused: bool = False,
    ) -> None:
        self.names = list(names)
        self._config = config
        self._scaled = scaled
        zero = torch.zeros((), device=device)
        self._state = {
            "scale": torch.full((), _FIRST_SCALE if scaled else 1.0, device=device),
            "good_in_a_row": zero.clone(),
            "bad_in_a_row": zero.clone(),
            "nonfinite": zero.clone(),
            "exploding": zero.clone(),
            "skipped": zero.clone(),
            "stop": zero.clone(),
        }
        self._bad_tensors = torch.zeros(len(names), dtype=torch.bool, device=device)
        self._kernel: GradientNorm | None = None
        if fused:
            zclip = config.zclip and ZClip(
                config.zclip.decay, config.zclip.z_limit, config.zclip.warmup_steps
            )
            self._kernel = GradientNorm(max_norm=config.clip_norm, zclip=zclip)

    @property
    def scale(self) -> Tensor:
        """What the loss is multiplied by before the backward pass."""
        return self._state["scale"]

    @torch.no_grad()
    def inspect(self, gradients: Sequence[Tensor | None]) -> Verdict:
        """Judges one step's gradients and moves the counters."""
        config, state = self._config, self._state
        scale = state["scale"].clone()
        norm, tensor_norms, coefficient = self._measure(gradients, scale)
        nonfinite = ~torch.isfinite(norm)
        exploding = torch.zeros_like(nonfinite)
        if config.explode_norm is not None:
            exploding = (norm > config.explode_norm) & ~nonfinite
        bad = nonfinite | exploding
        skip = state["stop"] > 0
        if config.on_nonfinite == "skip" or self._scaled:
            skip = skip | nonfinite
        if config.on_explode == "skip":
            skip = skip | exploding
        self._count(nonfinite, exploding, bad, skip)
        self._bad_tensors |= ~torch.isfinite(tensor_norms)
        if self._scaled:
            self._move_scale(nonfinite)
        return Verdict(norm, tensor_norms, scale / coefficient, skip.float())

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Scale and counters are the same after this context as before it."""
        kept = {name: value.clone() for name, value in self.state_dict().items()}
        bad = self._bad_tensors.clone()
        try:
            yield
        finally:
            self.load_state_dict(kept)
            self._bad_tensors.copy_(bad)

    def counters(self) -> Mapping[str, Tensor]:
        """Device scalars to log: bad steps so far, and whether the run must stop."""
        names = ("nonfinite", "exploding", "skipped", "bad_in_a_row", "stop")
        return {name: self._state[name].clone() for name in names}

    def take_bad_names(self) -> list[str]:
        """Parameters with non-finite gradients since the last call; waits for the device."""
        bad = [n for n, b in zip(self.names, self._bad_tensors.tolist(), strict=True) if b]
        self._bad_tensors.zero_()
        return bad

    def state_dict(self) -> dict[str, Tensor]:
        """Scale and counters, and the past norms that ZClip knows."""
        zclip = self._kernel.state_dict() if self._kernel and self._config.zclip else {}
        return {**self._state, **zclip}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        for name, value in self._state.items():
            value.copy_(state[name])
        if self._kernel and self._config.zclip:
            self._kernel.load_state_dict({"zclip": state["zclip"]})

    def _measure(
        self, gradients: Sequence[Tensor | None], scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Global norm, `[parameters]` norms, clip coefficient; norms are unscaled."""
        if self._kernel is not None:
            found = self._kernel(gradients, scale)
            return found.global_norm, found.tensor_norms, found.clip_coefficient
        tensor_norms = self._tensor_norms(gradients) / scale
        norm = torch.linalg.vector_norm(tensor_norms)
        coefficient = torch.ones_like(norm)
        if self._config.clip_norm is not None:
            # The 1e-6 of torch.nn.utils.clip_grad_norm_, so that both clip alike.
            coefficient = (self._config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm, tensor_norms, coefficient

    def _tensor_norms(self, gradients: Sequence[Tensor | None]) -> Tensor:
        present = [g for g in gradients if g is not None]
        # In fp64 only where there is some: torch refuses to narrow.
        wide = torch.float64 if any(g.dtype == torch.float64 for g in present) else torch.float32
        norms = torch._foreach_norm(present, 2, dtype=wide) if present else []  # pyright: ignore[reportPrivateImportUsage]
        zero = torch.zeros((), device=self._bad_tensors.device)
        found = iter([norm.float() for norm in norms])
        return torch.stack([next(found) if g is not None else zero for g in gradients])

    def _count(self, nonfinite: Tensor, exploding: Tensor, bad: Tensor, skip: Tensor) -> None:
        state, stop_after = self._state, self._config.stop_after
        state["nonfinite"] += nonfinite
        state["exploding"] += exploding
        state["skipped"] += skip
        state["bad_in_a_row"].copy_(torch.where(bad, state["bad_in_a_row"] + 1, 0))
        if stop_after:
            # A latch: the host sees it at the next log point, and no update goes through till then.
            state["stop"].copy_(torch.maximum(state["stop"], state["bad_in_a_row"] >= stop_after))

    def _move_scale(self, overflow: Tensor) -> None:
        state = self._state
        good = torch.where(overflow, 0, state["good_in_a_row"] + 1)
        grow = good >= _GROWTH_INTERVAL
        factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
        state["scale"].mul_(factor).clamp_(min=1.0)
        state["good_in_a_row"].copy_(torch.where(grow, 0, good))


class NormSummary:
    """Sums per-tensor norms up to groups and layers, on the device and in a fixed order.

    Args:
        names: of the parameters, in the order of the norms.
        groups: parameter groups.
        task: whose `layer_blocks` are the layers; parameters outside go under their top-level
            module.
    """

    def __init__(self, names: Sequence[str], groups: Sequence[Group], task: Task) -> None:
        group_of = {name: group.name for group in groups for name in group.parameters}
        blocks = [block.name for block in task.layer_blocks]
        device = next(iter(groups[0].parameters.values())).device
        labels = {
            "group": [group_of[name] for name in names],
            "layer": [_layer_of(name, blocks) for name in names],
        }
        self._kinds: dict[str, list[str]] = {}
        self._members: dict[str, Tensor] = {}
        for kind, of_name in labels.items():
            found = list(dict.fromkeys(of_name))
            members = torch.tensor([[label == row for label in of_name] for row in found])
            self._kinds[kind], self._members[kind] = found, members.to(device)

    def __call__(self, tensor_norms: Tensor) -> dict[str, Tensor]:
        """'group/<name>' and 'layer/<name>' -> L2 norm, from `[parameters]` norms."""
        squares = tensor_norms.square()
        values: dict[str, Tensor] = {}
        for kind, found in self._kinds.items():
            # A masked sum, since a float scatter on a GPU adds in no fixed order.
            sums = torch.where(self._members[kind], squares, 0).sum(dim=1).sqrt()
            values.update({f"{kind}/{name}": sums[i] for i, name in enumerate(found)})
        return values


def _layer_of(name: str, blocks: Sequence[str]) -> str:
    for block in blocks:
        if name.startswith(block + "."):
            return block
    return name.partition(".")[0]


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradients of the parameters, None where there is none."""
    return [parameter.grad for parameter in parameters]
