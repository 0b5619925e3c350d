"""Captured steps without a GPU: in place of a CUDA graph, a call that is made again."""

import dataclasses
import inspect
import io
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from captured_steps import (
    KINDS,
    assert_same_bits,
    everything,
    frozen,
    make_step,
    record,
)
from no_bytes import NoBytes
from rich.console import Console
from small_model import make_batch, squared_error
from torch import Tensor, nn
from torch.nn import functional

from fastft.graphs import choose as choose_module
from fastft.graphs.choose import choose_graph, first_alike
from fastft.graphs.compare import first_difference
from fastft.graphs.graph import StepGraph
from fastft.graphs.inputs import StaticBatches, form_of, same_form
from fastft.graphs.record import NotCaptured, Run, explain
from fastft.step import TrainingStep
from fastft.task import Batch, Loss


class Clock(NoBytes):
    """Times of calls, uncaptured and captured in turns; each call is made once."""

    def __init__(self, *seconds: float) -> None:
        self._seconds, self.calls = seconds, 0

    def seconds(
        self, call: Callable[[], object], repeats: int, *, host_ahead: bool = False
    ) -> float:
        call()
        self.calls += 1
        return self._seconds[(self.calls - 1) % len(self._seconds)]


def micro_batches(seed: int, count: int = 2) -> list[Batch]:
    return [make_batch(seed=count * seed + i) for i in range(count)]


def choose(step: TrainingStep, capture=record, fits=lambda: True, clock=None, steps=None):
    steps = [micro_batches(0), micro_batches(1)] if steps is None else steps
    clock = clock or Clock(0.002, 0.001)
    return choose_graph(step, steps, 100, record=capture, fits=fits, meter=clock, say=print)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("punished", [False, True])
def test_captured_steps_are_uncaptured_steps(kind: Any, punished: bool) -> None:
    """With batches in between that are met once, and get no graph."""
    plain, captured = make_step(kind, punished=punished), make_step(kind, punished=punished)
    captured.graph, decision = choose(captured)
    captured.optimizer.forget()
    assert decision.startswith("used; a step takes 1.00 ms captured, 2.00 ms uncaptured")
    for index in range(10):
        batches = micro_batches(index, count=1 if index == 4 else 2)
        if index == 6:
            batches[0] = make_batch(5)
        a, b = plain(index, batches), captured(index, batches)
        assert_same_bits(dataclasses.astuple(a), dataclasses.astuple(b))
        assert captured.task.model.get_parameter("0.weight").grad is None
    assert_same_bits(everything(plain), everything(captured))
    assert plain.untouched_names() == ["spare.weight"]


def test_a_result_outlives_the_next_replay() -> None:
    step = make_step()
    step.graph, _ = choose(step)
    first = step(0, micro_batches(0))
    kept = first.loss.item(), first.parts["output"].item()
    step(1, micro_batches(1))
    assert (first.loss.item(), first.parts["output"].item()) == kept


@pytest.mark.parametrize("clock", [(0.002, 0.001), (0.001, 0.002)])
def test_choosing_changes_nothing(clock: tuple[float, float]) -> None:
    step = make_step()
    before = everything(step)
    graph, _ = choose(step, clock=Clock(*clock))
    step.optimizer.forget()
    assert (graph is None) == (clock[0] < clock[1])
    assert step.graph is None
    assert_same_bits(everything(step), before)
    assert all(p.grad is None for p in step.task.model.parameters())


class Odd(nn.Module):
    """One linear layer; `change` is called in each forward pass and gives a factor."""

    count: Tensor
    late: Tensor | None

    def __init__(self, change: Callable[["Odd"], Any]) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(4, 1), change
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.change(self)


def count_calls(module: Odd) -> float:
    module.calls += 1
    return 1.0


def replace_buffer(module: Odd) -> float:
    module.count = module.count + 1
    return 1.0


def grow_buffer(module: Odd) -> Tensor:
    if module.late is None:
        module.late = torch.ones(())
    return module.late


def count_in_place(module: Odd) -> float:
    module.count.add_(1)
    return 1.0


REFUSED = {
    "a counter": (count_calls, "each step changes 'calls', which"),
    "a replaced buffer": (replace_buffer, "each step changes 'count', which"),
    "Python's draws": (lambda _: random.random(), "changes Python's random numbers"),
    "numpy's draws": (lambda _: np.random.rand(), "changes numpy's random numbers"),  # noqa: NPY002
    "torch's draws": (lambda _: torch.rand(()), "changes torch's random numbers on the host"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_a_step_changes_on_the_host_is_refused(change: Any, reason: str) -> None:
    graph, decision = choose(make_step(model=Odd(change)))
    assert graph is None
    assert decision.startswith("not used, because each step changes ")
    assert reason in decision


@pytest.mark.parametrize("change", [grow_buffer, count_in_place])
def test_what_is_made_once_or_filled_in_place_is_not(change: Any) -> None:
    graph, _ = choose(make_step(model=Odd(change)))
    assert graph is not None


def learning_rate_loss(model: nn.Module, batch: Batch) -> Loss:
    found = squared_error(model, batch)
    return Loss(found.total * batch.lr_factor, found.parts)


def test_a_loss_that_follows_the_learning_rate_is_refused() -> None:
    """What the host computed at the capture stays."""
    step = make_step(loss=learning_rate_loss)
    graph, decision = choose(step)
    assert graph is None
    assert decision == "not used, because it changes the loss"


def test_outputs_that_do_not_follow_the_batch_are_refused() -> None:
    graph, decision = choose(make_step(), capture=frozen)
    assert graph is None
    assert decision == "not used, because it changes the loss"


def test_the_reason_of_a_failed_capture_is_told() -> None:
    def fail(run: Run, device: torch.device) -> Any:
        raise NotCaptured("it cannot be captured: operation not permitted")

    graph, decision = choose(make_step(), capture=fail)
    assert graph is None
    assert decision == "not used, because it cannot be captured: operation not permitted"


def test_an_error_is_told_with_the_line_that_is_not_torchs() -> None:
    """Torch's modules call it, and torch's operators are called by it."""

    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, torch.ones(1, 3))

    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(Narrow())(torch.ones(2, 2))
    told = explain(caught.value)
    assert told.startswith("mat1 and mat2 shapes cannot be multiplied (2x2 and 3x1) (")
    line = inspect.getsourcelines(Narrow)[1] + 2
    assert told.endswith(f"test_graphs.py:{line}, return functional.linear(x, torch.ones(1, 3)))")
    assert explain(ValueError()) == "ValueError()"


@pytest.mark.parametrize("code", ["return x[mask]", "tokens = '[/INST]'"])
def test_code_that_is_quoted_is_no_markup(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the decision, and in what is said later."""

    def decide(config: Any, step: Any, loader: Any, say: Callable[[str], object]) -> str:
        say(f"later: {code}")
        return f"not used: {code}"

    monkeypatch.setattr(choose_module, "_capture_on_gpu", decide)
    step: Any = SimpleNamespace(precision=SimpleNamespace(device=torch.device("cuda")), replay=None)
    config: Any = SimpleNamespace(step=SimpleNamespace(cuda_graphs="auto"))
    forwards: Any = SimpleNamespace(ways={}, chosen={})
    console = Console(file=io.StringIO(), width=20)
    choose_module.capture_step(config, step, forwards, cast(Any, None), (), console)
    said = cast(io.StringIO, console.file).getvalue()
    assert said == f"later: {code}\nstep.cuda_graphs: not used: {code}\n"


def test_too_little_memory_is_told() -> None:
    graph, decision = choose(make_step(), fits=lambda: False)
    assert graph is None
    assert "too little memory" in decision


@pytest.mark.parametrize(("seconds", "told"), [(0.0012, "1.20"), (0.00105, "1.05")])
def test_a_graph_that_is_slower_or_hardly_faster_is_not_used(seconds: float, told: str) -> None:
    clock = Clock(0.0011, seconds)
    graph, decision = choose(make_step(), clock=clock)
    assert graph is None
    assert decision == f"not used, because a step takes {told} ms captured, 1.10 ms uncaptured"
    assert clock.calls == 6


def test_the_first_that_are_alike() -> None:
    steps = [[make_batch(size)] for size in (8, 6, 7, 6, 8)]
    assert first_alike(iter(steps)) == [steps[1], steps[3]]
    assert first_alike(iter(steps[:3])) is None


def test_sparse_batches_are_refused() -> None:
    batch = Batch({"inputs": torch.eye(4).to_sparse()}, 4)
    graph, decision = choose(make_step(), capture=None, steps=[[batch], [batch]])
    assert graph is None
    assert "sparse" in decision


BATCH = Batch(
    {
        "x": torch.arange(6.0).view(2, 3),
        "nested": [{"y": torch.ones(2, dtype=torch.int64)}, "2020-01-01", 3],
    },
    2,
    "era5",
)


def changed(**data: Any) -> Batch:
    return dataclasses.replace(BATCH, data={**BATCH.data, **data})


NESTED = BATCH.data["nested"]
OTHERS = {
    "shape": changed(x=torch.ones(3, 2)),
    "dtype": changed(x=torch.ones(2, 3).half()),
    "strides": changed(x=torch.ones(3, 2).t()),
    "layout": changed(x=torch.ones(2, 3).to_sparse()),
    "no tensor": changed(x=1.0),
    "another field": changed(z=1),
    "text": changed(nested=[NESTED[0], "2020-01-02", 3]),
    "number": changed(nested=[NESTED[0], "2020-01-01", 4]),
    "array": changed(nested=[NESTED[0], "2020-01-01", np.zeros(2)]),
    "structure": changed(nested=[NESTED[0], "2020-01-01"]),
    "size": dataclasses.replace(BATCH, size=3),
    "source": dataclasses.replace(BATCH, source="cams"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_other_batches_do_not_match(other: Batch) -> None:
    ours, theirs = form_of([BATCH]), form_of([other])
    assert not same_form(ours, theirs)
    assert not same_form(theirs, ours)


def test_arrays_never_match() -> None:
    ours, theirs = (changed(nested=np.zeros(2)) for _ in range(2))
    assert not same_form(form_of([ours]), form_of([theirs]))


def test_batches_that_match_are_copied() -> None:
    static = StaticBatches([BATCH, BATCH])
    other = changed(x=torch.full((2, 3), 7.0), nested=[{"y": torch.zeros(2).long()}, *NESTED[1:]])
    other = dataclasses.replace(other, lr_factor=0.5)
    places = [batch["x"].data_ptr() for batch in static.batches]
    assert same_form(form_of([BATCH, BATCH]), form_of([BATCH, other]))
    assert not same_form(form_of([BATCH, BATCH]), form_of([BATCH]))
    static.fill([BATCH, other])
    assert torch.equal(static.batches[0]["x"], BATCH["x"])
    assert torch.equal(static.batches[1]["x"], other["x"])
    assert torch.equal(static.batches[1]["nested"][0]["y"], torch.zeros(2).long())
    assert [batch["x"].data_ptr() for batch in static.batches] == places
    assert static.batches[0]["x"].data_ptr() != BATCH["x"].data_ptr()


def test_a_graph_keeps_what_the_model_drops() -> None:
    """A graph on a GPU would read its memory."""
    model = Odd(grow_buffer)
    step = make_step(model=model)
    graph = StepGraph(step, StaticBatches([make_batch()]), record)
    # The rehearsal has put the buffer back.
    assert model.late is None
    assert any(torch.equal(kept, torch.ones(())) for kept in graph._kept)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("theirs", "odd"),
    [
        ({}, None),
        ({"the loss": 2.001}, None),
        ({"the loss": 2.1}, "the loss"),
        ({"the loss": NAN}, "the loss"),
        ({"the gradients' norm": 9.0}, "the gradients' norm"),
        # Of the norm it is nothing.
        ({"the gradient of 'a'": 0.002}, None),
        ({"the gradient of 'b'": 0.5}, "the gradient of 'b'"),
        ({"another": 1.0}, "another"),
    ],
)
def test_differences(theirs: dict[str, float], odd: str | None) -> None:
    ours = {
        "the loss": 2.0,
        "the gradients' norm": 10.0,
        "the gradient of 'a'": 1e-6,
        "the gradient of 'b'": 9.0,
    }
    assert first_difference([ours, ours], [ours, {**ours, **theirs}]) == odd


def test_overflows_are_no_difference_where_both_have_them() -> None:
    both = {"the loss": NAN, "the gradients' norm": INF, "the gradient of 'a'": 1.0}
    assert first_difference([both], [dict(both)]) is None
    assert first_difference([both], [{**both, "the gradient of 'a'": 2.0}]) is not None


def test_auto_on_a_cpu_is_said_and_nothing_else(project: Any, fastft: Any) -> None:
    outcome = fastft("train", "run.toml", "step.cuda_graphs=auto")
    assert outcome.code == 0
    assert "step.cuda_graphs: only counts on a GPU; this run is on a CPU" in outcome.output
    assert "cuda_graphs" not in fastft("train", "run.toml", "run.folder=other").output
    # It changes no result, so a run may go on with another value.
    more = ("run.steps=3", "step.cuda_graphs=off", "checkpoint.resume=auto")
    assert fastft("train", "run.toml", *more).code == 0
