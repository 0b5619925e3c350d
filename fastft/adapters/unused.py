"""For adapters that fetch pretrained weights of their own."""

from pathlib import Path
from typing import Any


def unused_weights(
    option: str, asked: Any, checkpoint: Path | None, *, pretrained: bool
) -> list[str]:
    """Says so where an option asks for weights that `Adapter.build` is told not to fetch.

    Args:
        option: its name in the run file.
        asked: its value.
        checkpoint: `build`'s, as `pretrained`.
    """
    if not asked or pretrained or checkpoint is None:
        return []
    return [
        f"{option} is not used: with model.strict, model.checkpoint fills all that is not in"
        " finetune.new_heads"
    ]
