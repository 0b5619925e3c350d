"""Learning rates of upstream's, for `optim.preset`; both with Adam and a cosine down to zero."""

from typing import Any


def optim_presets() -> dict[str, dict[str, Any]]:
    """Name -> part of `[optim]`."""
    cosine = {"name": "adam", "schedule": {"name": "cosine"}}
    return {
        # Of upstream's guide to fine-tuning: a tenth of its default, or lower.
        "guide": {**cosine, "lr": 1e-5},
        "default": {**cosine, "lr": 1e-4},
    }
