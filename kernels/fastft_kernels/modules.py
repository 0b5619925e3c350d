"""`FusedLayerNorm`, and the swap of a model's layer norms for it, in place."""

from dataclasses import dataclass

from torch import Tensor, nn

from fastft_kernels.device import FLOAT_DTYPES, MAX_COLUMNS, transformed
from fastft_kernels.layer_norm import layer_norm


class FusedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with the same parameters and state dict, computed by `layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., *normalized_shape]` in, the same shape out.

        float64 and torch.func transforms, which the op does not know, go through torch's norm.

        Raises:
            ValueError: the last dimensions are not `normalized_shape`.
        """
        if input.dtype not in FLOAT_DTYPES or transformed():
            return super().forward(input)
        # A norm without weights fits any row, so the op cannot know.
        if input.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise ValueError(
                f"FusedLayerNorm: the last dimensions must be {tuple(self.normalized_shape)}; "
                f"got {tuple(input.shape)}; make the norm for this size"
            )
        flat = input.flatten(-len(self.normalized_shape)) if self.many else input
        weight, bias = self.weight, self.bias
        if self.many:
            weight, bias = (t if t is None else t.flatten() for t in (weight, bias))
        return layer_norm(flat, weight, bias, self.eps).view(input.shape)

    @property
    def many(self) -> bool:
        """True when the norm spans several dimensions."""
        return len(self.normalized_shape) > 1


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    hooks += (module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


@dataclass(frozen=True)
class SwapReport:
    """What `use_fused_layer_norm` changed, by module name, and what it left with the reason."""

    swapped: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"fused layer norm: {len(self.swapped)} swapped, {len(self.kept)} kept"]
        return "\n".join(lines + [f"  {name}: kept, {reason}" for name, reason in self.kept])


def use_fused_layer_norm(
    model: nn.Module, *, alike: tuple[type[nn.LayerNorm], ...] = ()
) -> SwapReport:
    """Turns every `nn.LayerNorm` of the model into a `FusedLayerNorm`, keeping its parameters.

    The class changes, not the object: hooks, parameters, names and the optimizer's references
    stay as they are.

    Args:
        model: changed in place.
        alike: subclasses of `nn.LayerNorm` that compute what it computes over the last dimensions.
            Others are kept, because their forward may do anything.
    """
    swapped, kept = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.LayerNorm) or isinstance(module, FusedLayerNorm):
            continue
        if reason := _obstacle(module, alike):
            kept.append((name, reason))
        else:
            module.__class__ = FusedLayerNorm
            swapped.append(name)
    return SwapReport(tuple(swapped), tuple(kept))


def _obstacle(module: nn.LayerNorm, alike: tuple[type[nn.LayerNorm], ...]) -> str | None:
    columns = 1
    for size in module.normalized_shape:
        columns *= size
    same_forward = type(module).forward is nn.LayerNorm.forward
    if not same_forward and type(module) not in alike:
        return f"{type(module).__qualname__} has a forward of its own"
    if columns > MAX_COLUMNS:
        return f"{columns} elements per row, more than {MAX_COLUMNS}"
    if any(p.dtype not in FLOAT_DTYPES for p in module.parameters()):
        return "parameters are not float32, bfloat16 or float16"
    return None
