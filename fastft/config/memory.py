"""How much memory a run may take."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from fastft.config.base import describe, strict

_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
_SIZE = r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)"


def parse_bytes(text: str) -> int:
    """Bytes of '80GB' (80e9) or '74.5 GiB' (2**30 each).

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(_SIZE, text)
    if found is None or not float(found[1]):
        raise ValueError(f"must be a size such as '80GB' or '22GiB'; got '{text}'")
    return round(float(found[1]) * _UNITS[found[2]])


def _checked(text: str) -> str:
    parse_bytes(text)
    return text


@dataclass(frozen=True, kw_only=True, config=strict)
class MemoryConfig:
    """What may be kept for the backward pass, and what is computed again."""

    budget: Annotated[
        Annotated[str, AfterValidator(_checked)] | None,
        describe(
            "GPU memory that the run may take, as '80GB' (80e9 bytes) or '22GiB'; default: what"
            " the device has. Enforced.",
            json_schema_extra={"pattern": f"^{_SIZE}$"},
        ),
    ] = None
    plan: Annotated[
        Literal["auto", "off"] | Path,
        describe(
            "'auto': measured before the first step on a GPU; 'off': keep everything, take no"
            " measurements; or a plan.json to replay."
        ),
    ] = "auto"
