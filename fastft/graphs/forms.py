"""Captured steps of batches in several forms: shapes, data sets, host values."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastft.graphs.compare import difference
from fastft.graphs.graph import StepGraph
from fastft.graphs.inputs import Form, StaticBatches, apart, form_of, same_form
from fastft.graphs.record import TOO_LITTLE_MEMORY, CaptureFailed, NotCaptured, Record
from fastft.step import TrainingStep
from fastft.task import Batch, Loss

# Forms that are captured in a run, or refused.
MOST_FORMS = 8
# Forms whose first batches are held until they are met again; batches take memory.
MOST_WAITING = 4


@dataclass
class _Form:
    """A form that was met.

    Attributes:
        first: the batches of the first time, until a capture is tried; then None.
        graph: None where there is none yet, or its steps run uncaptured.
    """

    form: Form
    first: Sequence[Batch] | None = None
    graph: StepGraph | None = None


class StepGraphs:
    """A captured step for each form of batches, for `TrainingStep.graph`.

    A form is captured where it is met for the second time: with the first time's batches, so that
    those of the second show whether the graph follows its inputs. Before that, and where the graph
    changes something, its steps run uncaptured. Captures leave the step as it was.

    Args:
        record: captures, all graphs into one memory.
        total: steps of the run, over which the learning rate changes.
        say: told of forms that run uncaptured, once of each.
    """

    def __init__(
        self, step: TrainingStep, record: Record, total: int, say: Callable[[str], object]
    ) -> None:
        self._step, self._record, self._total, self._say = step, record, total, say
        self._forms: list[_Form] = []
        self._most, self._has_said = MOST_FORMS, False
        self._next: StepGraph | None = None

    @property
    def count(self) -> int:
        """Forms that were captured."""
        return sum(met.graph is not None for met in self._forms)

    def add(self, batches: Sequence[Batch]) -> StepGraph:
        """Captures a form, and leaves comparing to the caller.

        Raises:
            NotCaptured: with the reason.
        """
        graph = StepGraph(self._step, StaticBatches(batches), self._record)
        self._forms.append(_Form(form_of(batches), graph=graph))
        return graph

    def takes(self, batches: Sequence[Batch]) -> bool:
        """Whether there is a graph for the batches; captures it, where they are the second."""
        form = form_of(batches)
        met = next((met for met in self._forms if same_form(met.form, form)), None)
        if met is None:
            self._remember(form, batches)
        elif met.first is not None:
            self._capture(met, met.first, batches)
        self._next = None if met is None else met.graph
        return self._next is not None

    def replay(self, batches: Sequence[Batch]) -> Sequence[Loss]:
        """Forward and backward of batches that it takes; its losses are overwritten by the next."""
        assert self._next is not None
        return self._next.replay(batches)

    def _remember(self, form: Form, batches: Sequence[Batch]) -> None:
        if self._is_full():
            if not self._has_said:
                self._has_said = True
                self._say(
                    f"step.cuda_graphs: batches come in more than {MOST_FORMS} forms (shapes, data"
                    " sets or host values); steps with others run uncaptured"
                )
            return
        waiting = [met for met in self._forms if met.first is not None]
        if len(waiting) == MOST_WAITING:
            self._forms.remove(waiting[0])
        self._forms.append(_Form(form, first=[apart(batch) for batch in batches]))

    def _capture(self, met: _Form, first: Sequence[Batch], second: Sequence[Batch]) -> None:
        met.first = None
        reason = failure = None
        try:
            graph = StepGraph(self._step, StaticBatches(first), self._record)
            changed = difference(self._step, [first, second], self._total, graph.replay)
            reason = None if changed is None else f"a graph changes {changed}"
        except CaptureFailed as error:
            graph, failure = None, str(error)
        except NotCaptured as error:
            graph, reason = None, str(error)
        except torch.OutOfMemoryError:
            graph, failure = None, TOO_LITTLE_MEMORY
        if failure is not None:
            self._give_up(failure)
        elif reason is not None:
            self._say(f"step.cuda_graphs: batches of another form run uncaptured, because {reason}")
        else:
            met.graph = graph
        if self._is_full():
            self._forms = [met for met in self._forms if met.first is None]

    def _is_full(self) -> bool:
        return sum(met.first is None for met in self._forms) >= self._most

    def _give_up(self, failure: str) -> None:
        """Drops all graphs: what a failed attempt took of their memory goes back with them only."""
        self._forms, self._next, self._most, self._has_said = [], None, 0, True
        gc.collect()
        self._say(
            f"step.cuda_graphs: no longer used, because batches came in another form, and {failure}"
        )
