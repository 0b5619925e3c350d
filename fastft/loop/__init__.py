"""`for step in ...`, and the hooks that are due."""

from fastft.loop.hooks import (
    EvaluateHook,
    LogHook,
    SaveHook,
    UnfreezeHook,
    check_evaluation,
    check_monitor,
)
from fastft.loop.progress import Progress
from fastft.loop.scoring import score, try_evaluation
from fastft.loop.state import TrainingState, find_resumed
from fastft.loop.steps import Hook, run_loop

__all__ = [
    "EvaluateHook",
    "Hook",
    "LogHook",
    "Progress",
    "SaveHook",
    "TrainingState",
    "UnfreezeHook",
    "check_evaluation",
    "check_monitor",
    "find_resumed",
    "run_loop",
    "score",
    "try_evaluation",
]
