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


def _dynamo() -> Any:
    """torch's module, None where nothing has imported it: that takes a second."""
    return sys.modules.get("torch._dynamo.utils")
