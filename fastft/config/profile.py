"""The profile of a run: which steps are watched, and how closely."""

from typing import Annotated

from pydantic.dataclasses import dataclass

from fastft.config.base import Count, describe, strict


@dataclass(frozen=True, kw_only=True, config=strict)
class ProfileConfig:
    """A few steps under torch's profiler, and a report on where their time and memory went."""

    at_step: Annotated[
        Count,
        describe(
            "First profiled step, counted from 0; choose one after compilation. The step before it"
            " warms the profiler up, so the first step of a run cannot be profiled."
        ),
    ] = 10
    steps: Annotated[Count, describe("Profiled steps.")] = 3
    memory: Annotated[
        bool,
        describe(
            "Also record every allocation of the step before them; on a GPU only. The traced steps"
            " are not slowed down by it."
        ),
    ] = True
