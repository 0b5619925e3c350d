"""What the sections share: strictness, descriptions, ranges."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[DecayRate, DecayRate]
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]


def describe(text: str, **limits: Any) -> Any:
    """A field's description, which `fastft schema` shows, with further limits."""
    return Field(description=text, **limits)
