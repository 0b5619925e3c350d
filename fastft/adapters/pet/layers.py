"""Two of upstream's modules written for compiling: nothing waits for the GPU, and any size will do.

Their numbers are upstream's.
"""

from types import MethodType

import torch
from metatrain.pet.modules.backend import PETBackend
from metatrain.pet.modules.transformer import CartesianTransformer
from torch import Tensor, nn


def use_own_layers(backend: PETBackend) -> None:
    """Sets the forwards of the network's layers and norms."""
    own = {CartesianTransformer: _layer, nn.RMSNorm: _rms_norm}
    for module in backend.modules():
        if type(module) in own:
            # Bound, so that a deep copy of the module computes with the copy's weights.
            module.forward = MethodType(own[type(module)], module)


def _layer(
    self: CartesianTransformer,
    nodes: Tensor,
    messages: Tensor,
    kinds: Tensor,
    vectors: Tensor,
    present: Tensor,
    distances: Tensor,
    factors: Tensor,
    use_manual_attention: bool,
) -> tuple[Tensor, Tensor]:
    """A layer over atoms [N, ...] and their neighbours [N, K, ...].

    Upstream sets the factors of empty places to zero, as `_network_inputs` has done, and by an
    index: its derivative takes a zero that lies on the host, and each step waits for its copies.
    """
    edges = self.edge_embedder(torch.cat([vectors, distances[..., None]], dim=2))
    parts = [edges, messages] if self.is_first else [edges, self.neighbor_embedder(kinds), messages]
    tokens = self.compress(torch.cat(parts, dim=2))
    # The atom's own token comes first. Every query has the same weights.
    factors = torch.cat([torch.ones_like(factors[:, :1]), factors], dim=1)
    factors = factors[:, None].expand(-1, factors.shape[1], -1)
    nodes, edges = self.trans(nodes[:, None], tokens, factors, use_manual_attention)
    return nodes.squeeze(1), edges


def _rms_norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm over the last axis, written out where it is compiled.

    On a GPU torch 2.11 differentiates its own by a formula in C++ that reads sizes as numbers: what
    is compiled would be for one number of atoms.
    """
    if self.weight is None or not torch.compiler.is_compiling():
        return nn.RMSNorm.forward(self, x)
    eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self.weight
