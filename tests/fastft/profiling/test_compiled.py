"""torch.compile's own counters."""

import torch
from torch import Tensor

from fastft.profiling.compiled import CompileWatch, compile_facts, graph_count


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


def test_the_watch_tells_of_what_comes_after_the_first_look() -> None:
    def scaled(x: Tensor, power: int) -> Tensor:
        return x**power

    compiled = torch.compile(scaled, backend="eager")
    compiled(torch.ones(3), 2)
    watch = CompileWatch()
    first, _ = watch.look()
    compiled(torch.ones(3), 2)
    assert watch.look() == (first, [])
    compiled(torch.ones(3), 3)
    values, messages = watch.look()
    assert values["compile/graphs"] == first["compile/graphs"] + 1
    assert len(messages) == 1
    assert messages[0].startswith("torch.compile compiled again, graphs: 1; ")
    assert "power" in messages[0]

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break("seen by the watch")
        return x + 1

    torch.compile(broken, backend="eager")(torch.ones(3))
    values, messages = watch.look()
    assert values["compile/graph_breaks"] > first["compile/graph_breaks"]
    assert any("left a graph" in m and "seen by the watch" in m for m in messages)
