"""Aurora (github.com/microsoft/aurora): weather on a grid, from upstream's own package."""

from fastft.adapters.aurora.adapter import AuroraAdapter
from fastft.adapters.aurora.extend import insert_layer_norms
from fastft.adapters.aurora.options import AuroraLossOptions, AuroraOptions

__all__ = ["AuroraAdapter", "AuroraLossOptions", "AuroraOptions", "insert_layer_norms"]
