"""Names and colours of phases and kinds, alike on the page and in TensorBoard.

The colours are dark enough for white text on them, and not too dark to be seen on black.
"""

from fastft.profiling.kinds import KINDS
from fastft.profiling.report import IDLE

KIND_COLOURS = {
    "matmul": "#2b6cb0",
    "attention": "#805ad5",
    "convolution": "#0f7b83",
    "norm": "#9c6a00",
    "elementwise": "#c2511b",
    "optimizer": "#3f7d32",
    "copies": "#b8336a",
    "communication": "#5a5fc4",
    "other": "#6e6e6e",
    IDLE: "#8a8a8a",
}
PHASE_COLOURS = {
    "data": "#b8336a",
    "forward": "#2b6cb0",
    "backward": "#805ad5",
    "graph": "#0f7b83",
    "gradients": "#9c6a00",
    "update": "#3f7d32",
    "other": "#6e6e6e",
}


def kind_label(name: str, *, on_gpu: bool) -> str:
    """How a kind of work is called; what is idle depends on who works."""
    if name == IDLE:
        return "idle" if on_gpu else "outside operators"
    if name == "other" and not on_gpu:
        return "other operators"
    return KINDS[name]
