"""Which ways are measured, and what is guessed of those that are not."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_blocks import CPU
from no_bytes import NoBytes
from torch import Tensor, nn

from fastft.blocks import COMPILED, KEEP, RECOMPUTE, BlockForwards
from fastft.memory import menu
from fastft.memory.menu import Choices, Menu, guess
from fastft.memory.solve import BlockCosts, Choice, Solution, StepCosts, solve
from fastft.memory.trial import Call, Trial, long_lived_apart
from fastft.precision import make_precision
from fastft.task import Block, Loss, Task

NAMES = [way.name for way in COMPILED if not way.offload]
GRAPHS = NAMES[1:-1]
SHARES = dict(zip(NAMES, (1.0, 0.75, 0.5, 0.35, 0.2, 0.0), strict=True))
MB = 10**6


class Meter(NoBytes):
    """No call is timed."""

    def seconds(
        self, call: Callable[[], object], repeats: int, *, host_ahead: bool = False
    ) -> float:
        return 0.0


class Blocks:
    """Compiled blocks of several kinds, whose costs are simulated; notes what is compiled.

    Args:
        kinds: blocks, MB that each keeps, and the power by which less takes longer.
    """

    def __init__(
        self,
        kinds: Sequence[tuple[int, int, float]],
        monkeypatch: pytest.MonkeyPatch,
        fails: Iterable[str] = (),
    ) -> None:
        widths = [width for width, (count, _, _) in enumerate(kinds, 1) for _ in range(count)]
        model = nn.Sequential(*(nn.Linear(width, width) for width in widths))
        blocks = [Block(name, module) for name, module in model.named_children()]
        self.task = Task(model, lambda model, batch: Loss(torch.zeros(())), blocks)
        self.calls = {
            block.name: Call((torch.zeros(1, width),), {})
            for block, width in zip(blocks, widths, strict=True)
        }
        self.forwards = BlockForwards(self.task, "blocks", make_precision("fp32", CPU))
        self.compiled: list[tuple[int, str]] = []
        self.said: list[str] = []
        self._kinds = kinds

        def cost(trial: Trial, meter: object) -> Choice:
            width = trial._parameters[0].shape[0]
            if trial.way in GRAPHS:
                self.compiled.append((width, trial.way))
            if trial.way in fails:
                raise torch.OutOfMemoryError
            return self.cost(width, trial.way)

        def seconds(trial: Trial, meter: object) -> float:
            return self.cost(trial._parameters[0].shape[0], trial.way).seconds

        monkeypatch.setattr(menu, "measure_block", cost)
        monkeypatch.setattr(Trial, "seconds", seconds)

    def cost(self, width: int, way: str) -> Choice:
        _, kept, power = self._kinds[width - 1]
        share = SHARES[way]
        size = round((0.1 + 0.9 * share) * kept * MB)
        return Choice(way, size, size, kept * MB, 1 + 0.3 * (1 - share) ** power)

    def assemble(self, choices: Choices) -> StepCosts:
        blocks = (BlockCosts(name, tuple(of.values()), 0) for name, of in choices.items())
        return StepCosts(tuple(blocks), 0, 0, 0, 0, 0, 0, 0.0)

    def menu(self) -> Menu:
        made = Menu(self.task, self.forwards, self.calls, NAMES, Meter(), say=self.said.append)
        made.measure()
        assert self.compiled == []
        return made

    def all(self) -> StepCosts:
        return self.assemble(
            {
                name: {way: self.cost(call.arguments[0].shape[1], way) for way in NAMES}
                for name, call in self.calls.items()
            }
        )

    def room(self, share: float) -> int:
        """For a peak between those of keeping the least and all."""
        most = sum(kept * count for count, kept, _ in self._kinds)
        largest = max(kept for _, kept, _ in self._kinds)
        return round((0.1 + 0.9 * share) * most * MB) + largest * MB


def best(costs: StepCosts, room: int) -> Solution:
    found = solve(costs, room)
    assert found is not None
    return found


# As in a weather model: several blocks of three sizes, one that keeps much, one that keeps little.
MANY = [(4, 540, 2.0), (6, 270, 2.5), (5, 150, 1.7), (1, 800, 2.2), (2, 100, 2.5)]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_not_all_of_many_graphs_are_compiled(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(MANY, monkeypatch)
    room = blocks.room(share)
    costs = blocks.menu().measure_for([room], blocks.assemble)
    found = best(costs, room)
    assert len(set(blocks.compiled)) == len(blocks.compiled) < 10
    assert found.seconds <= 1.005 * best(blocks.all(), room).seconds
    # What is guessed is never in a plan.
    measured = {(width, way) for width in range(1, 6) for way in (KEEP.name, RECOMPUTE.name)}
    measured |= set(blocks.compiled)
    for block in costs.blocks:
        width = blocks.calls[block.name].arguments[0].shape[1]
        assert {(width, choice.name) for choice in block.choices} <= measured


def test_a_kind_that_keeps_little_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(MANY, monkeypatch)
    for name, ways in blocks.menu().choices(guessed=True).items():
        little = blocks.calls[name].arguments[0].shape[1] == len(MANY)
        assert list(ways) == ([KEEP.name, RECOMPUTE.name] if little else NAMES)


def test_one_of_very_many_kinds_keeps_little_and_has_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = Blocks([(1, 100, 2.0)] * 25, monkeypatch)
    for ways in blocks.menu().choices(guessed=True).values():
        assert list(ways) == NAMES


def test_several_budgets_share_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(MANY, monkeypatch)
    rooms = [blocks.room(share) for share in (0.1, 0.3, 0.7)]
    costs = blocks.menu().measure_for(rooms, blocks.assemble)
    assert len(set(blocks.compiled)) == len(blocks.compiled)
    for room in rooms:
        assert best(costs, room).seconds <= 1.01 * best(blocks.all(), room).seconds


# Of the last, one kind keeps 4 %.
@pytest.mark.parametrize(
    "kinds", [[(24, 500, 2.0)], [(8, 500, 2.0), (8, 250, 3.0)], [(8, 500, 2.0), (1, 150, 2.0)]]
)
def test_all_of_few_graphs_are_compiled(
    kinds: list[tuple[int, int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Blocks(kinds, monkeypatch)
    costs = blocks.menu().measure_for([blocks.room(0.5)], blocks.assemble)
    assert sorted(set(blocks.compiled)) == sorted(blocks.compiled)
    assert len(blocks.compiled) == len(kinds) * len(GRAPHS)
    assert costs == blocks.all()


def test_no_graph_is_compiled_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks([(24, 500, 2.0)], monkeypatch)
    assert len(blocks.menu().measure_for([], blocks.assemble).blocks[0].choices) == 2
    many = Blocks(MANY, monkeypatch)
    # Nothing fits, and everything.
    many.menu().measure_for([0, many.room(2)], many.assemble)
    assert blocks.compiled == many.compiled == []


def test_a_graph_that_fails_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(MANY, monkeypatch, fails=GRAPHS)
    costs = blocks.menu().measure_for([blocks.room(0.4)], blocks.assemble)
    assert {len(block.choices) for block in costs.blocks} == {2}
    assert len(set(blocks.compiled)) == len(blocks.compiled) == len(blocks.said) > 0
    assert blocks.said[0].endswith(": out of memory")


def test_where_not_even_one_block_can_keep_all_graphs_are_not_guessed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = Blocks([(3, 500, 2.0)], monkeypatch, fails=[KEEP.name])
    made = Menu(blocks.task, blocks.forwards, blocks.calls, NAMES, Meter(), say=blocks.said.append)
    assert list(made.measure()["0"]) == NAMES[1:]
    assert [way for _, way in blocks.compiled] == GRAPHS


def costs_of(curve: Mapping[float, float]) -> dict[float, Choice]:
    return {
        share: Choice("", round(1000 * share), round(2000 * share), 500, seconds)
        for share, seconds in curve.items()
    }


def test_a_guess_lies_between_a_line_and_the_best_of_a_convex_curve() -> None:
    def seconds(share: float, **more: float) -> float:
        curve = {0.0: 1.4, 1.0: 1.0, **{float(f"0.{name[1:]}"): t for name, t in more.items()}}
        return guess("a", share, costs_of(curve)).seconds

    assert guess("a", 0.5, costs_of({0.0: 1.4, 1.0: 1.0})) == Choice("a", 500, 1000, 500, 1.05)
    # A quarter of what lies between: the line, and that through the other two.
    assert seconds(0.25, s5=1.1) == pytest.approx(1.15 + 0.25 * (1.25 - 1.15))
    # Keeping all is faster.
    assert seconds(0.75, s5=1.1) == pytest.approx(1.0 + 0.25 * (1.05 - 1.0))
    # Not above the line where the curve is not convex.
    assert seconds(0.25, s5=1.39) == pytest.approx(1.395)


@given(
    st.floats(1.0, 4.0), st.lists(st.sampled_from([0.2, 0.35, 0.5, 0.75]), min_size=1, unique=True)
)
def test_a_straight_line_is_guessed_right(slope: float, shares: list[float]) -> None:
    known = costs_of({share: 1 + slope * (1 - share) for share in (0.0, *shares[1:], 1.0)})
    guessed = guess("a", shares[0], known)
    assert guessed.kept_bytes == round(1000 * shares[0])
    line = 1 + slope * (1 - shares[0])
    # With two others on a side there is nothing to hope for.
    assert guessed.seconds <= line + 1e-9
    if len(shares) > 1:
        assert guessed.seconds == pytest.approx(line)


def test_what_was_expanded_stays_so() -> None:
    """Or a compiled block would be compiled once more."""
    wide = torch.ones(1, 3, requires_grad=True).expand(4, 3)
    call = Call((wide.detach().requires_grad_(),), {})
    (fresh,), _ = call.fresh()
    assert isinstance(fresh, Tensor)
    assert fresh.stride() == (0, 1)
    assert fresh.requires_grad
    assert not fresh.is_leaf
    assert torch.equal(fresh, wide)


def test_collections_of_garbage_are_as_before() -> None:
    with long_lived_apart():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
