"""Where the time and memory of a few steps go: `torch.profiler`, a report and advice.

`trace` reads what the profiler wrote, `measure` turns it into a `ProfileReport`, `advice` says what
to change, `page` and `chart` show it. All of these are pure; `hook` does the rest.
"""

from fastft.profiling.advice import advise
from fastft.profiling.hook import ProfileHook, open_profile, write_report
from fastft.profiling.measure import measure
from fastft.profiling.page import render_page
from fastft.profiling.report import (
    Advice,
    CompileEvent,
    CompileFacts,
    MemoryReport,
    ProfileReport,
    RunFacts,
)
from fastft.profiling.trace import parse_trace, read_trace

__all__ = [
    "Advice",
    "CompileEvent",
    "CompileFacts",
    "MemoryReport",
    "ProfileHook",
    "ProfileReport",
    "RunFacts",
    "advise",
    "measure",
    "open_profile",
    "parse_trace",
    "read_trace",
    "render_page",
    "write_report",
]
