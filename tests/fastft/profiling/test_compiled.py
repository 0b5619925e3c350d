"""torch.compile's own counters."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastft.profiling.compiled import (
    CompileWatch,
    compile_facts,
    evaluation_compiles,
    graph_count,
)


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


def test_the_watch_gives_the_reasons_since_the_last_look() -> None:
    def raised(x: Tensor, early: int, late: int) -> Tensor:
        x = x**early
        return x + late

    compiled = torch.compile(raised, backend="eager")
    watch = CompileWatch()
    compiled(torch.ones(3), 2, 1)
    watch.look()
    compiled(torch.ones(3), 3, 1)
    assert "early" in watch.look()[1][0]

    # Without a reason: another function, compiled for the first time.
    torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))
    values, messages = watch.look()
    assert messages == []
    compiled(torch.ones(3), 3, 5)
    compiled(torch.ones(5), 3, 5)
    after, (message,) = watch.look()
    assert after["compile/graphs"] > values["compile/graphs"]
    assert message.startswith("torch.compile compiled again, graphs: 2; ")
    assert "late" in message
    assert "size mismatch" in message
    assert "early" not in message


def test_graphs_of_an_evaluation_are_no_news() -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    compiled = torch.compile(doubled, backend="eager")
    watch = CompileWatch()
    compiled(torch.ones(3, requires_grad=True))
    first, _ = watch.look()
    with evaluation_compiles(), torch.no_grad():
        compiled(torch.ones(3))
    second, messages = watch.look()
    assert second["compile/graphs"] == first["compile/graphs"] + 1
    assert messages == []
    compiled(torch.ones(4, requires_grad=True))
    assert len(watch.look()[1]) == 1


def test_graph_breaks_are_told_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))
    watch = CompileWatch()
    watch.look()
    reasons = [f"a reason\n  {letter}" for letter in "qwertyuiop"]
    monkeypatch.setitem(counters, "graph_break", Counter(reasons))
    expected = [f"torch.compile left a graph: {' '.join(reason.split())}" for reason in reasons]
    assert watch.look()[1] == expected
