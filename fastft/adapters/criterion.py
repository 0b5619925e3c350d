"""For adapters whose loss is their own."""

from fastft.errors import ConfigError
from fastft.task import Criterion


def refuse_terms(criterion: Criterion | None, why: str, advice: str) -> None:
    """Raises a ConfigError where the run file has `[loss]` terms, which made the criterion."""
    if criterion is not None:
        raise ConfigError(f"loss.terms: must be absent, since {why}; got some; {advice}")
