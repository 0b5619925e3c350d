"""A captured step for each form of batches; without a GPU, as in `test_graphs`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from captured_steps import KINDS, assert_same_bits, everything, frozen, make_step, record
from small_model import make_batch, squared_error
from torch import nn

from fastft.graphs import forms
from fastft.graphs.forms import StepGraphs
from fastft.graphs.record import TOO_LITTLE_MEMORY, CaptureFailed, Outputs, Run
from fastft.step import TrainingStep
from fastft.task import Batch, Loss


class Counted:
    """Captures by `record`, and counts; fails with an error where there is one."""

    def __init__(self, capture: Callable[..., Any] = record, error: Exception | None = None):
        self._capture, self._error, self.calls = capture, error, 0

    def __call__(self, run: Run, device: torch.device) -> tuple[Callable[[], object], Outputs]:
        self.calls += 1
        if self._error is not None:
            raise self._error
        return self._capture(run, device)


def start(
    step: TrainingStep, capture: Callable[..., Any] = record
) -> tuple[StepGraphs, list[str], Counted]:
    """Graphs of a step, the first of batches of 8, what is said, and later captures."""
    said, later = [], Counted(capture)
    graphs = StepGraphs(step, record, 100, said.append)
    graphs.add([make_batch(8)])
    graphs._record = later
    step.graph = graphs
    return graphs, said, later


def sizes(step: TrainingStep, numbers: Sequence[int], first: int = 0) -> list[Any]:
    """Steps with batches of so many samples."""
    results = []
    for index, size in enumerate(numbers, start=first):
        batch = make_batch(size, seed=index)
        results.append(dataclasses.astuple(step(index, [batch])))
    return results


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_graphs_of_three_forms_give_the_bits_of_none(kind: Any) -> None:
    """Weights, optimizer, running statistics, loss scale, random numbers; captured on the way."""
    plain, captured = make_step(kind), make_step(kind)
    graphs, said, later = start(captured)
    captured.optimizer.forget()
    numbers = [8, 6, 6, 8, 7, 6, 8, 7, 7, 6]
    assert_same_bits(sizes(plain, numbers), sizes(captured, numbers))
    assert_same_bits(everything(plain), everything(captured))
    assert (graphs.count, later.calls, said) == (3, 2, [])


def test_resumed_in_between_gives_the_same_bits() -> None:
    """Where other steps are captured than without the interruption."""
    numbers = [8, 6, 6, 8, 6, 8, 6]
    whole, halves = make_step(), make_step()
    start(whole)
    expected = sizes(whole, numbers)
    start(halves)
    found = sizes(halves, numbers[:3])
    start(halves)
    found += sizes(halves, numbers[3:], first=3)
    assert_same_bits(found, expected)
    assert_same_bits(everything(halves), everything(whole))


def test_a_form_is_captured_the_second_time() -> None:
    step = make_step()
    graphs, _, later = start(step)
    batch = make_batch(6)
    assert not graphs.takes([batch])
    assert later.calls == 0
    assert graphs.takes([make_batch(6, seed=1)])
    assert graphs.takes([batch])
    assert later.calls == 1


class Dropping(nn.Module):
    """Draws random numbers, as a rehearsal must give back in the middle of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 1), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(x))


def test_a_refused_form_runs_uncaptured_and_is_said_once() -> None:
    """One whose draws on the host a graph would not repeat; and the step goes on as if untried."""
    plain, refused = make_step(model=Dropping()), make_step(model=Dropping())
    refused.task.model.load_state_dict(plain.task.model.state_dict())
    said: list[str] = []
    refused.graph = graphs = StepGraphs(refused, record, 100, said.append)
    numbers = [6, 6, 6, 7, 7, 6]
    outcomes = []
    for step in (plain, refused):
        torch.manual_seed(1)
        outcomes.append((sizes(step, numbers), everything(step)))
    assert_same_bits(*outcomes)
    assert graphs.count == 0
    assert len(said) == 2
    assert said[0].startswith(
        "step.cuda_graphs: batches of another form run uncaptured, because each step changes"
    )


def test_a_graph_that_does_not_follow_its_inputs_is_refused() -> None:
    """Which the batches that it was captured with would not show."""
    step = make_step()
    graphs, said, _ = start(step, frozen)
    sizes(step, [6, 6, 6])
    assert graphs.count == 1
    assert said == [
        "step.cuda_graphs: batches of another form run uncaptured, because a graph changes the loss"
    ]


@pytest.mark.parametrize(
    "failure", [None, TOO_LITTLE_MEMORY, "it cannot be captured: operation not permitted"]
)
def test_a_failed_capture_gives_all_graphs_up(failure: str | None) -> None:
    """The run goes on as if there had been none; None: the uncaptured step does not fit beside."""
    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Loss:
        nonlocal calls
        calls += batch.size == 7
        if calls == 2 and failure is None:
            raise torch.OutOfMemoryError
        return squared_error(model, batch)

    plain, short = make_step(), make_step(loss=loss)
    graphs, said, _ = start(short)
    short.optimizer.forget()
    if failure is not None:
        graphs._record = Counted(error=CaptureFailed(failure))
    numbers = [8, 7, 7, 8, 6, 6, 7]
    assert_same_bits(sizes(short, numbers), sizes(plain, numbers))
    assert_same_bits(everything(short), everything(plain))
    assert graphs.count == 0
    assert graphs._next is None
    assert said == [
        "step.cuda_graphs: no longer used, because batches came in another form, and"
        f" {failure or TOO_LITTLE_MEMORY}"
    ]


def test_forms_beyond_the_most_run_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MOST_FORMS", 3)
    monkeypatch.setattr(forms, "MOST_WAITING", 3)
    plain, captured = make_step(), make_step()
    graphs, said, later = start(captured)
    captured.optimizer.forget()
    # Four forms that are met once come in between; the oldest is forgotten, and no graph's place.
    numbers = [8, 2, 3, 4, 5, 2, 6, 6, 7, 5, 5, 7, 7, 4, 7, 6, 8]
    assert_same_bits(sizes(captured, numbers), sizes(plain, numbers))
    assert (graphs.count, later.calls) == (3, 2)
    assert len(said) == 1
    assert "batches come in more than 3 forms" in said[0]
    assert all(form.first is None for form in graphs._forms)


def test_few_batches_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is dropped, and its form begins anew."""
    monkeypatch.setattr(forms, "MOST_WAITING", 2)
    step = make_step()
    graphs, _, later = start(step)
    for size in (2, 3, 4, 2, 3):
        assert not graphs.takes([make_batch(size)])
        assert sum(met.first is not None for met in graphs._forms) <= 2
    assert later.calls == 0
    assert graphs.takes([make_batch(3, seed=1)])


def asks_for_gradients(batch: Batch) -> None:
    batch["inputs"].requires_grad_()


def writes_into_its_tensors(batch: Batch) -> None:
    batch["inputs"].mul_(0.5).add_(0.1)


def adds_a_field(batch: Batch) -> None:
    cast(Any, batch.data).setdefault("extra", batch["inputs"].mean())


def replaces_a_field(batch: Batch) -> None:
    cast(Any, batch.data)["inputs"] = 0.5 * batch["inputs"]


@pytest.mark.parametrize(
    "change", [asks_for_gradients, writes_into_its_tensors, adds_a_field, replaces_a_field]
)
def test_a_loss_may_change_its_batch(change: Callable[[Batch], None]) -> None:
    """A capture runs it on the batches of the step that goes on, and on some of before."""

    def loss(model: nn.Module, batch: Batch) -> Loss:
        change(batch)
        found = squared_error(model, batch)
        return dataclasses.replace(found, total=found.total + batch.data.get("extra", 0))

    plain, captured = make_step(loss=loss), make_step(loss=loss)
    graphs, said, _ = start(captured)
    numbers = [6, 6, 8, 6, 8]
    assert_same_bits(sizes(plain, numbers), sizes(captured, numbers))
    assert_same_bits(everything(plain), everything(captured))
    assert (graphs.count, said) == (2, [])


def test_sparse_batches_of_another_form_are_refused() -> None:
    def loss(model: nn.Module, batch: Batch) -> Loss:
        inputs = batch["inputs"]
        return squared_error(model, Batch({**batch.data, "inputs": inputs.to_dense()}, batch.size))

    step = make_step(loss=loss)
    graphs, said, _ = start(step)
    dense = make_batch(6)
    batch = Batch({**dense.data, "inputs": dense["inputs"].to_sparse()}, 6)
    for index in range(3):
        step(index, [batch])
    assert graphs.count == 1
    assert len(said) == 1
    assert "because batches hold sparse or nested tensors" in said[0]
