"""torch.compile's own counters."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo import utils as dynamo
from torch._dynamo.output_graph import GraphCompileReason

from fastft.profiling import CompileEvent, CompileFacts, compiled
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
    (broke,) = [e for e in facts.graph_breaks if "for the test" in e.reason]
    assert (broke.where, broke.count) == (line_of(broken, 2), 1)
    (again,) = [e for e in facts.recompiles if "power" in e.reason]
    # The part behind the break is a function of its own, which begins there.
    assert (again.where, again.count) == (line_of(broken, 2), 1)


def line_of(function: Callable[..., object], lines_below: int) -> str:
    """Of its `def`, or below."""
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno + lines_below}"


def test_breaks_are_found_in_calls_branches_and_loops() -> None:
    def called(x: Tensor) -> Tensor:
        torch._dynamo.graph_break("in a call")
        return x + 1

    def branched(x: Tensor) -> Tensor:
        x = called(x)
        return x + 1 if x.sum() > 0 else x - 1

    def looped(x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + 1
            torch._dynamo.graph_break("in a loop")
        return x

    for function in (branched, looped):
        torch.compile(function, backend="eager")(torch.ones(3))
    events = compile_facts(0).graph_breaks
    reasons = {event.where: event.reason for event in events}
    # A call that breaks is no second break at the same place.
    assert len(events) == len(reasons)
    assert not any("For more details" in reason for reason in reasons.values())
    assert "in a call" in reasons[line_of(called, 1)]
    assert reasons[line_of(branched, 2)].startswith("a branch on the value of a tensor")
    assert "in a loop" in reasons[line_of(looped, 3)]


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
    assert messages[0].endswith(f" at {line_of(scaled, 0)}")

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break("seen by the watch")
        return x + 1

    torch.compile(broken, backend="eager")(torch.ones(3))
    values, messages = watch.look()
    assert values["compile/graph_breaks"] > first["compile/graph_breaks"]
    (message,) = [message for message in messages if "seen by the watch" in message]
    assert message.startswith(f"torch.compile left a graph at {line_of(broken, 1)}: ")
    assert "\n" not in message


def test_breaks_that_torch_forgets_stay_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [
        CompileFacts(graphs=2, graph_breaks=(CompileEvent("a.py:1", "a loop", 3),)),
        CompileFacts(graphs=9, graph_breaks=(CompileEvent("b.py:2", "a call", 1),)),
    ]
    monkeypatch.setattr(compiled, "compile_facts", lambda before: facts.pop(0))
    watch = CompileWatch()
    assert [watch.look()[0]["compile/graph_breaks"] for _ in range(2)] == [3, 4]


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


def test_graph_breaks_are_told_once_and_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))
    watch = CompileWatch()
    watch.look()
    reasons = [f"a reason\n  {letter}" for letter in "qwertyuiop"]
    breaks = [GraphCompileReason(reason, [], graph_break=False) for reason in reasons * 2]
    monkeypatch.setattr(dynamo, "graph_break_reasons", breaks)
    expected = [f"torch.compile left a graph: {' '.join(reason.split())}" for reason in reasons]
    assert watch.look()[1] == expected
    assert watch.look()[1] == []
