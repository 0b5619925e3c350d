"""What torch.compile has done in this process, from torch's own counters."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from fastft.profiling.report import CompileFacts

# Distinct reasons that one message gives.
_SHOWN = 3


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
    reasons = (c.recompile_reason for c in _compilations())
    return CompileFacts(
        graphs=counters["stats"]["unique_graphs"],
        graphs_in_window=counters["stats"]["unique_graphs"] - graphs_before,
        graph_breaks={str(reason): n for reason, n in counters["graph_break"].items()},
        recompiles=tuple(reason for reason in reasons if reason),
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
        self._breaks: dict[str, int] = {}

    def look(self) -> tuple[dict[str, float], list[str]]:
        """Values to log, and what to tell the user; both empty while nothing is compiled."""
        facts = compile_facts(0)
        if not facts.graphs:
            return {}, []
        messages = [
            f"torch.compile left a graph: {' '.join(reason.split())}"
            for reason in facts.graph_breaks
            if reason not in self._breaks
        ]
        reasons = [] if self._seen is None else _reasons_since(self._seen)
        if reasons:
            why = "; ".join(list(dict.fromkeys(reasons))[:_SHOWN])
            messages.append(f"torch.compile compiled again, graphs: {len(reasons)}; {why}")
        self._seen, self._breaks = _latest(), dict(facts.graph_breaks)
        breaks = float(sum(facts.graph_breaks.values()))
        return {"compile/graphs": float(facts.graphs), "compile/graph_breaks": breaks}, messages


def _compilations() -> list[Any]:
    """torch's notes on the last 64, oldest first."""
    dynamo = _dynamo()
    return dynamo.get_compilation_metrics() if dynamo else []


def _latest() -> int:
    """When the last one began, in microseconds; 0 without any."""
    return max((c.start_time_us or 0 for c in _compilations()), default=0)


def _reasons_since(seen: int) -> list[str]:
    """Why something was compiled again in the steps after that."""
    return [
        " ".join(c.recompile_reason.split())
        for c in _compilations()
        if c.recompile_reason
        and (began := c.start_time_us or 0) > seen
        and not any(before < began <= after for before, after in _evaluations)
    ]


def _dynamo() -> Any:
    """torch's module, None where nothing has imported it: that takes a second."""
    return sys.modules.get("torch._dynamo.utils")
