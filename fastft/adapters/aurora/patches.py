"""Encoder and decoder in chunks of patches: exact, since levels are aggregated patch by patch.

Whole, the decoder's activations are tensors `[B, L, C_A, D]`, and the peak of a step. All chunks
are equally long, so that one compiled graph serves them, and each is recomputed on its own.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from aurora.model.decoder import Perceiver3DDecoder
from aurora.model.encoder import Perceiver3DEncoder
from aurora.model.patchembed import LevelPatchEmbed
from aurora.model.perceiver import PerceiverResampler
from torch import Tensor, nn
from torch.nn import functional


class PatchDecoder(nn.Module):
    """What the decoder does patch by patch: all but putting the patches together.

    It is no part of the model, which has the decoder's parameters once.
    """

    def __init__(self, decoder: Perceiver3DDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        x: Tensor,
        encoded: Tensor,
        surf_vars: tuple[str, ...],
        atmos_vars: tuple[str, ...],
        levels: tuple[int | float, ...],
    ) -> tuple[Tensor, Tensor]:
        """Surface and atmospheric variables of some patches.

        Args:
            x: latent levels, the surface's first, `[B, C, L, D]`.
            encoded: the levels' Fourier expansion `[C_A, D]`.

        Returns:
            `[B, 1, L, P * P * V_S]` and `[B, C_A, L, P * P * V_A]`.
        """
        decoder = cast(Any, self.decoder)
        x = x.transpose(1, 2)
        surface = [decoder.surf_heads[name](x[..., :1, :]) for name in surf_vars]
        embedded = decoder.atmos_levels_embed(encoded.to(x.dtype)).expand(*x.shape[:2], -1, -1)
        perceivers = [decoder.level_decoder]
        if decoder.separate_perceiver:
            perceivers.append(decoder.level_decoder_alternate)
        found = [decoder.deaggregate_levels(embedded, x[..., 1:, :], each) for each in perceivers]
        # The last is that of the variables that have one of their own.
        shared, own = found[0], found[-1]
        given = {"levels": levels} if decoder.level_condition else {}
        upper = [
            decoder.atmos_heads[name](
                own if name in decoder.separate_perceiver else shared, **given
            )
            for name in atmos_vars
        ]
        return _stacked(surface), _stacked(upper)


def _stacked(fields: list[Tensor]) -> Tensor:
    """Variables `[B, L, C, P * P]` as one tensor `[B, C, L, P * P * V]`, the variable last."""
    return torch.stack(fields, dim=-1).flatten(-2).transpose(1, 2)


def chunk_patches(model: nn.Module, most: int) -> None:
    """Makes the encoder aggregate levels in chunks, and gives the decoder its `PatchDecoder`.

    Args:
        most: patches of a chunk, of all samples together.
    """

    def aggregate(self: Perceiver3DEncoder, x: Tensor) -> Tensor:
        def run(part: Tensor) -> tuple[Tensor, ...]:
            return (Perceiver3DEncoder.aggregate_levels(self, part),)

        return in_chunks(run, x, most)[0]

    def decode(self: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return in_chunks(lambda part: self.patches(part, *arguments), x, most)

    encoder, decoder = cast(Any, model.encoder), cast(Any, model.decoder)
    # Bound, so that a deep copy of the model computes with the copy's weights.
    encoder.aggregate_levels = MethodType(aggregate, encoder)
    decoder.decode_patches = MethodType(decode, decoder)
    # Past the registration of modules: names and checkpoints stay upstream's.
    decoder.__dict__["patches"] = PatchDecoder(decoder)


def rewrite_for_compilers(model: nn.Module) -> None:
    """Has compiled code compute patch embeddings and queries in fewer operations.

    Eager code is upstream's, to the bit; these differ from it in last bits.
    """
    for module in model.modules():
        if isinstance(module, LevelPatchEmbed):
            module.forward = MethodType(_embed, module)
        if isinstance(module, PerceiverResampler):
            query = cast(Any, module.layers[0])[0].to_q
            query.forward = MethodType(_query, query)


def _embed(self: LevelPatchEmbed, x: Tensor, var_names: tuple[str, ...]) -> Tensor:
    """Patches do not overlap: the convolution is one product of matrices."""
    if not torch.compiler.is_compiling():
        return LevelPatchEmbed.forward(self, x, var_names)
    _, rows, columns = self.kernel_size
    weight = torch.cat([self.weights[name][:, :, : x.shape[2]] for name in var_names], dim=1)
    # [B, V, T, H, W] -> [B, H / P, W / P, V, T, P, P] -> [B, L, V * T * P * P]
    x = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).permute(0, 3, 5, 1, 2, 4, 6)
    return self.norm(functional.linear(x.flatten(3).flatten(1, 2), weight.flatten(1), self.bias))


def _query(self: nn.Linear, latents: Tensor) -> Tensor:
    """The first layer's latents are the same for all patches, and so are the queries."""
    if not torch.compiler.is_compiling() or latents.stride(0) != 0:
        return nn.Linear.forward(self, latents)
    # Not every attention kernel takes what is only expanded.
    return nn.Linear.forward(self, latents[:1]).expand(len(latents), -1, -1).contiguous()


def in_chunks(
    run: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, most: int
) -> tuple[Tensor, ...]:
    """`run` over chunks of x `[B, C, L, D]` along L, and its outputs, `[B, C', L, D']`, joined."""
    patches = x.shape[2]
    count = chunk_count(patches, max(1, most // x.shape[0]))
    if count == 1:
        return run(x)
    length = -(-patches // count)
    if missing := count * length - patches:
        x = functional.pad(x, (0, 0, 0, missing))
    parts = [run(part) for part in x.split(length, dim=2)]
    joined = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return tuple(whole[:, :, :patches] for whole in joined)


def chunk_count(patches: int, most: int) -> int:
    """The fewest chunks of at most `most` patches, or up to twice as many where those divide."""
    fewest = -(-patches // most)
    return next((n for n in range(fewest, 2 * fewest) if patches % n == 0), fewest)
