"""torch.compile's own counters."""

import torch
from torch import Tensor

from fastft.profiling.compiled import compile_facts, graph_count


def test_graphs_breaks_and_recompiles() -> None:
    def broken(x: Tensor, power: int) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break("for the test")
        return x**power

    compiled = torch.compile(broken, backend="eager")
    compiled(torch.ones(3), 2)
    before = graph_count()
    compiled(torch.ones(3), 3)
    facts = compile_facts(before)
    assert facts.graphs > facts.graphs_in_window > 0
    assert any("for the test" in reason for reason in facts.graph_breaks)
    assert any("power" in reason for reason in facts.recompiles)
