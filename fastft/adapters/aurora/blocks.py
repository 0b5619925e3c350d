"""Which modules are compiled, planned and recomputed, and what they compute in."""

from collections.abc import Iterator
from types import MethodType
from typing import Any, cast

import aurora
import torch
from aurora.model import swin3d
from torch import Tensor, nn

from fastft.task import Block


def blocks(model: aurora.Aurora, place: str = "") -> list[Block]:
    """All that takes memory, in forward order; none changes its sizes from batch to batch.

    The layers are the Swin blocks.
    """
    return list(_blocks(model, place))


def _blocks(model: aurora.Aurora, place: str) -> Iterator[Block]:
    ends = {name: Block(f"{place}{name}", m, layer=False) for name, m in _ends(model).items()}
    yield from (block for name, block in ends.items() if name != "decoder")
    for part in ("encoder_layers", "decoder_layers"):
        for i, layer in enumerate(getattr(model.backbone, part)):
            inside, name = cast(Any, layer), f"{place}backbone.{part}.{i}"
            for j, block in enumerate(inside.blocks):
                yield Block(f"{name}.blocks.{j}", block)
            for step in ("downsample", "upsample"):
                if getattr(inside, step) is not None:
                    yield Block(f"{name}.{step}", getattr(inside, step), layer=False)
    yield ends["decoder"]


def _ends(model: aurora.Aurora) -> dict[str, nn.Module]:
    """The blocks of encoder and decoder."""
    encoder, decoder = model.encoder, cast(Any, model.decoder)
    return {
        "encoder.surf_token_embeds": encoder.surf_token_embeds,
        "encoder.atmos_token_embeds": encoder.atmos_token_embeds,
        "encoder.surf_mlp": encoder.surf_mlp,
        "encoder.level_agg": encoder.level_agg,
        "decoder": decoder.patches,
    }


def prepare_blocks(model: aurora.Aurora, autocast: str) -> None:
    """Encoder and decoder compute as `model.options.autocast` says; all blocks can be compiled."""
    if autocast == "backbone":
        _keep_out_of_autocast(model.encoder)
        _keep_out_of_autocast(model.decoder)
    for block in _ends(model).values():
        # By themselves, since they are compiled with autocast inside.
        (_keep_out_of_autocast if autocast == "backbone" else _cast_anew)(block)
    _hold_masks_constant()


def _keep_out_of_autocast(module: nn.Module) -> None:
    """Runs the module in its weights' precision, whatever autocast is around it.

    aurora's own switches would do the same, but they choose a GPU where there is one, even for a
    model on the CPU, and compiled blocks would be autocast twice.
    """
    forward = cast(Any, module.forward).__func__

    def run(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        weight = next(self.parameters())
        # What the backbone returns is in low precision where autocast covers its last norm.
        whole = [_cast(a, weight.dtype) for a in arguments]
        with torch.autocast(weight.device.type, enabled=False):
            return forward(self, *whole, **keywords)

    # Bound, so that a deep copy of the module computes with the copy's weights.
    module.forward = MethodType(run, module)


def _cast_anew(module: nn.Module) -> None:
    """Has autocast cast the module's weights at each call.

    It would hold casts until the forward pass ends, and gradients of all chunks and roll-out steps
    would add up in them, in low precision.
    """
    forward = cast(Any, module.forward).__func__

    def run(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        kind = next(self.parameters()).device.type
        inside, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.autocast(kind, dtype, inside, cache_enabled=False):
            return forward(self, *arguments, **keywords)

    module.forward = MethodType(run, module)


def keep_backbone_in_bf16(model: aurora.Aurora) -> None:
    """Runs the backbone in bfloat16, whatever autocast is around it, where there is one.

    Each of its blocks by itself too: they are compiled with autocast inside, and measured alone.
    To be called when the blocks have their last forwards.
    """
    for block in blocks(model):
        if block.name.startswith("backbone."):
            _autocast_to_bf16(block.module)
    _autocast_to_bf16(model.backbone)


def _autocast_to_bf16(module: nn.Module) -> None:
    forward = cast(Any, module.forward).__func__

    def run(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        kind = next(self.parameters()).device.type
        if not torch.is_autocast_enabled(kind):
            return forward(self, *arguments, **keywords)
        # Both kinds of 16 bits in one sum would be widened.
        whole = [_cast(a, torch.float32) if _is_fp16(a) else a for a in arguments]
        with torch.autocast(kind, torch.bfloat16):
            return forward(self, *whole, **keywords)

    module.forward = MethodType(run, module)


def _is_fp16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float16


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value


def _hold_masks_constant() -> None:
    """Makes the attention masks of shifted windows constants of compiled blocks; may be repeated.

    Dynamo ignores the cache of the function that makes them, and traces 27 assignments into every
    shifted block; Inductor makes invalid C++ of them.
    """
    original = swin3d.compute_3d_shifted_window_mask
    if getattr(original, "_held_constant", False):
        return

    # Dynamo does not look at the wrapper of a cache, so a function must call it.
    def mask(*arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **keywords)

    held = torch._dynamo.assume_constant_result(mask)
    cast(Any, held)._held_constant = True
    swin3d.compute_3d_shifted_window_mask = held
