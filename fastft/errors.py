"""What fastft raises when the user can mend it.

Each message reads `where: what must hold; got what; do this`.
"""

import difflib
from collections.abc import Iterable


class FastftError(Exception):
    """An error with a cause the user can mend; the command line prints it without a traceback.

    Args:
        problems: one message, or all that were found at once.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(FastftError):
    """A run file, an override or a command-line argument."""


class DataError(FastftError):
    """A data set: missing, unreadable, or refused by a check."""


class CheckpointError(FastftError):
    """A checkpoint that cannot be read, does not fit the model, or cannot be written."""


class AdapterError(FastftError):
    """An adapter that is unknown, lacks its package, or was asked for what it cannot do."""


class PlanError(FastftError):
    """A memory budget that no plan meets, or a plan that does not fit the model."""


class TrainingStopped(FastftError):
    """Training ended early by its own policy, such as too many non-finite gradients."""

    exit_code = 3


class TrainingInterrupted(FastftError):
    """A signal ended the run after a finished step and a saved checkpoint."""

    exit_code = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """What to append to a message about an unknown name.

    `; did you mean 'x'?`, or `; choose from 'a', 'b', ...` where none is close, or nothing.
    """
    known = list(known)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean '{close[0]}'?"
    if not known:
        return ""
    listed = ", ".join(f"'{k}'" for k in known[:10])
    return f"; choose from {listed}{', ...' if len(known) > 10 else ''}"
