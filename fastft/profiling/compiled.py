"""What torch.compile has done in this process, from torch's own counters."""

import sys
from typing import Any

from fastft.profiling.report import CompileFacts


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
    # torch keeps the last 64 compilations.
    reasons = (c.recompile_reason for c in dynamo.get_compilation_metrics())
    return CompileFacts(
        graphs=counters["stats"]["unique_graphs"],
        graphs_in_window=counters["stats"]["unique_graphs"] - graphs_before,
        graph_breaks={str(reason): n for reason, n in counters["graph_break"].items()},
        recompiles=tuple(reason for reason in reasons if reason),
        cache_hits=counters["inductor"]["fxgraph_cache_hit"],
        cache_misses=counters["inductor"]["fxgraph_cache_miss"],
    )


class CompileWatch:
    """Counts graphs and graph breaks, and says when one comes after the first look.

    By the first look everything that a step needs has been compiled, unless shapes vary.
    """

    def __init__(self) -> None:
        self._graphs: int | None = None
        self._breaks: dict[str, int] = {}

    def look(self) -> tuple[dict[str, float], list[str]]:
        """Values to log, and what to tell the user; both empty while nothing is compiled."""
        facts = compile_facts(self._graphs or 0)
        if not facts.graphs:
            return {}, []
        messages = [
            f"torch.compile left a graph: {' '.join(reason.split())}"
            for reason in facts.graph_breaks.keys() - self._breaks.keys()
        ]
        if self._graphs is not None and facts.graphs_in_window:
            why = " ".join(facts.recompiles[-1].split()) if facts.recompiles else "a new input"
            messages.append(
                f"torch.compile compiled again, graphs: {facts.graphs_in_window}; {why}"
            )
        self._graphs, self._breaks = facts.graphs, dict(facts.graph_breaks)
        breaks = float(sum(facts.graph_breaks.values()))
        return {"compile/graphs": float(facts.graphs), "compile/graph_breaks": breaks}, messages


def _dynamo() -> Any:
    """torch's module, None where nothing has imported it: that takes a second."""
    return sys.modules.get("torch._dynamo.utils")
