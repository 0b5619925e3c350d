"""PET's attention on fastft's kernel, which is differentiable twice, as forces need."""

import math
from types import MethodType

from fastft_kernels import weighted_attention
from fastft_kernels.device import HEAD_COLUMNS
from fastft_kernels.weighted_attention import MAX_TOKENS
from metatrain.pet.modules.transformer import AttentionBlock
from torch import Tensor, nn


def use_kernels(model: nn.Module) -> None:
    """Sets the forwards of the attention blocks; upstream's run where the kernel does not.

    Upstream writes its attention out where it must be differentiated twice: all scores are in
    memory, in some ten forms.
    """
    for module in model.modules():
        if isinstance(module, AttentionBlock) and module.head_dim in HEAD_COLUMNS:
            # Bound, so that a deep copy of the module computes with the copy's weights.
            module.forward = MethodType(_attend, module)


def _attend(
    self: AttentionBlock, x: Tensor, cutoff_factors: Tensor, use_manual_attention: bool
) -> Tensor:
    if not use_manual_attention or x.shape[1] > MAX_TOKENS:
        return AttentionBlock.forward(self, x, cutoff_factors, use_manual_attention)
    # Upstream repeats them for every query.
    weights = cutoff_factors[:, 0].clamp(self.epsilon).log()
    scale = 1 / (math.sqrt(self.head_dim) * self.temperature)
    y = weighted_attention(self.input_linear(x), weights, self.num_heads, scale)
    return self.output_linear(y)
