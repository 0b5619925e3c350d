"""Weights in a file that tools of other families open."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fastft.errors import ConfigError


def write_portable(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's state dict as safetensors, under the model's own names.

    Raises:
        ConfigError: the file's name says another format.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"--to: must end in .safetensors, the format that is written; got '{path.suffix}'"
        )
    # Copies: safetensors takes no memory that tensors share, and no other order than rows.
    state = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    safetensors.torch.save_file(state, path, metadata=dict(metadata) if metadata else None)
