"""What torch.compile has done in this process, from torch's own counters and notes."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from fastft.profiling.report import CompileEvent, CompileFacts

# Distinct reasons that one message gives.
_SHOWN = 3
# From here on a page of torch's is named, and what followed from the break.
_MORE = "For more details about this graph break"


def graph_count() -> int:
    """Graphs compiled so far."""
    dynamo = _dynamo()
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def compile_facts(graphs_before: int) -> CompileFacts:
    """The counters now.

    Args:
        graphs_before: `graph_count()` when the profiled steps began.
    """
    dynamo = _dynamo()
    if dynamo is None:
        return CompileFacts()
    counters = dynamo.counters
    return CompileFacts(
        graphs=counters["stats"]["unique_graphs"],
        graphs_in_window=counters["stats"]["unique_graphs"] - graphs_before,
        graph_breaks=_by_place(_counted(_graph_breaks(dynamo))),
        recompiles=_counted(map(_recompile, _recompilations())),
        cache_hits=counters["inductor"]["fxgraph_cache_hit"],
        cache_misses=counters["inductor"]["fxgraph_cache_miss"],
    )


# When evaluations compiled: after the first and up to the last of each pair, as `_latest` gives it.
_evaluations: list[tuple[int, int]] = []


@contextlib.contextmanager
def evaluation_compiles() -> Iterator[None]:
    """What is compiled inside is an evaluation's, which needs graphs of its own: no news."""
    before = _latest()
    try:
        yield
    finally:
        if (after := _latest()) > before:
            _evaluations.append((before, after))


class CompileWatch:
    """Counts graphs and graph breaks, and says when one comes after the first look.

    By the first look everything that a step needs has been compiled, unless shapes vary. Graphs
    without a reason, which are a new function's, and those of evaluations are counted only.
    """

    def __init__(self) -> None:
        self._seen: int | None = None
        # Place and reason -> the most that were counted: torch forgets functions left to Python.
        self._breaks: dict[tuple[str, str], int] = {}

    def look(self) -> tuple[dict[str, float], list[str]]:
        """Values to log, and what to tell the user; both empty while nothing is compiled."""
        facts = compile_facts(0)
        if not facts.graphs:
            return {}, []
        messages = [
            f"torch.compile left a graph{_at(broken)}: {broken.reason}"
            for broken in facts.graph_breaks
            if (broken.where, broken.reason) not in self._breaks
        ]
        recompiles = () if self._seen is None else _recompiles_since(self._seen)
        if recompiles:
            count = sum(again.count for again in recompiles)
            why = "; ".join(f"{again.reason}{_at(again)}" for again in recompiles[:_SHOWN])
            messages.append(f"torch.compile compiled again, graphs: {count}; {why}")
        self._seen = _latest()
        for broken in facts.graph_breaks:
            event = broken.where, broken.reason
            self._breaks[event] = max(broken.count, self._breaks.get(event, 0))
        breaks = float(sum(self._breaks.values()))
        return {"compile/graphs": float(facts.graphs), "compile/graph_breaks": breaks}, messages


def _at(event: CompileEvent) -> str:
    """' at FILE:LINE'; '' where torch does not say."""
    return f" at {event.where}" if event.where else ""


def _graph_breaks(dynamo: Any) -> Iterator[tuple[str, str]]:
    """(where, why) of every break; of functions left to Python whole, among the last 64 only."""
    for broken in dynamo.graph_break_reasons:
        stack, reason = broken.user_stack, broken.reason
        # torch's note is for its own developers here.
        if reason.startswith("generic_jump"):
            reason = f"a branch on the value of a tensor ({reason})"
        yield _place(stack[-1].filename, stack[-1].lineno) if stack else "", reason
    for compilation in _compilations():
        # As where a loop holds the break.
        if compilation.fail_type == "Unsupported":
            place = compilation.fail_user_frame_filename, compilation.fail_user_frame_lineno
            yield _place(*place), compilation.fail_reason or ""


def _recompilations() -> list[Any]:
    return [compilation for compilation in _compilations() if compilation.recompile_reason]


def _recompile(compilation: Any) -> tuple[str, str]:
    """(where, why). All blocks of a class share the function, so the guard may be another's."""
    place = compilation.co_filename, compilation.co_firstlineno
    return _place(*place), compilation.recompile_reason


def _place(file: str | None, line: int | None) -> str:
    return f"{file}:{line}" if file else ""


def _counted(events: Iterable[tuple[str, str]]) -> tuple[CompileEvent, ...]:
    """Each place and reason once, in the order of their first times."""
    counts = Counter((where, _short(reason)) for where, reason in events)
    return tuple(CompileEvent(*event, count) for event, count in counts.items())


def _by_place(events: Iterable[CompileEvent]) -> tuple[CompileEvent, ...]:
    """Of a place the first: a call that breaks is told of its caller, too."""
    found: dict[str, CompileEvent] = {}
    for event in events:
        found.setdefault(event.where or event.reason, event)
    return tuple(found.values())


def _short(reason: str) -> str:
    """On one line, the reason itself."""
    return " ".join(str(reason).split(_MORE)[0].split())


def _compilations() -> list[Any]:
    """torch's notes on the last 64, oldest first."""
    dynamo = _dynamo()
    return dynamo.get_compilation_metrics() if dynamo else []


def _latest() -> int:
    """When the last one began, in microseconds; 0 without any."""
    return max((c.start_time_us or 0 for c in _compilations()), default=0)


def _recompiles_since(seen: int) -> tuple[CompileEvent, ...]:
    """What was compiled again in the steps after that."""
    return _counted(
        _recompile(c)
        for c in _recompilations()
        if (began := c.start_time_us or 0) > seen
        and not any(before < began <= after for before, after in _evaluations)
    )


def _dynamo() -> Any:
    """torch's module, None where nothing has imported it: that takes a second."""
    return sys.modules.get("torch._dynamo.utils")
