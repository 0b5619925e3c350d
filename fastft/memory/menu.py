"""Which ways of which blocks are measured.

A compiled block that keeps less is a graph of its own, which takes seconds to compile. Other ways
need none, and are all measured. Where there are many graphs, what they would cost is guessed; those
that the solver picks by these guesses are compiled and measured, until it picks none, or until they
promise too little.
"""

import dataclasses
import itertools
import math
import statistics
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from fastft.blocks import BlockForwards, Way
from fastft.memory.measure import distinct_blocks
from fastft.memory.meter import Meter
from fastft.memory.solve import Choice, StepCosts, solve
from fastft.memory.trial import Call, Trial, long_lived_apart, measure_block
from fastft.offload import HostMemoryError
from fastft.task import Task

_ROUNDS = 3
# Of what all blocks keep: a kind of block with a smaller share has two ways, all and least.
_LITTLE = 0.01
# As many graphs are compiled unasked. Where there are more, a kind of block with a smaller share
# than this has no graph but that of keeping all, unless it keeps half of what the largest does.
_FEW, _LITTLE_COMPILED = 8, 0.05
# Where a guess lies between a straight line and the best that a convex curve allows.
_HOPE = 0.75
# Of a step's time: what more compiling and trying must promise to save.
WORTH = 0.005
# How torch's selective checkpointing refuses a block that changes in place what it was to keep.
_IN_PLACE = "has been mutated"

# Block name -> way -> its cost, from most kept to least.
Choices = dict[str, dict[str, Choice]]


class Menu:
    """What a step's blocks cost under the ways that were measured so far.

    Each distinct block is measured once. All its ways are timed in turns, so that a device that
    changes its clock changes it for all of them; under a steady meter, where they are measured.

    Args:
        calls: what the blocks are called with; held as long as this is.
        names: ways, from most kept to least; the last must work.
        say: told of a way that a block cannot run, which leaves its menu.
    """

    def __init__(
        self,
        task: Task,
        forwards: BlockForwards,
        calls: Mapping[str, Call],
        names: Sequence[str],
        meter: Meter,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._forwards, self._calls, self._names = forwards, calls, names
        self._meter, self._say = meter, say
        # By the first block of each kind.
        self._kinds = {blocks[0].name: blocks for blocks in distinct_blocks(task, calls).values()}
        self._trials: dict[str, dict[str, Trial]] = {kind: {} for kind in self._kinds}
        self._found: Choices = {kind: {} for kind in self._kinds}
        # Graphs that may be compiled, if a budget needs them.
        self._graphs: dict[str, list[str]] = {kind: [] for kind in self._kinds}

    def measure(self) -> Choices:
        """Measures all ways that need no graph of their own; returns `choices`."""
        most, least, ways = self._names[0], self._names[-1], self._forwards.ways
        with long_lived_apart():
            for kind, name in itertools.product(self._kinds, (most, least)):
                self._attempt(kind, name)
            spreads = {kind: self._spread(kind) for kind in self._kinds}
            total = sum(spread for spread in spreads.values() if math.isfinite(spread))
            for kind, spread in spreads.items():
                between = self._names[1:-1] if spread >= _LITTLE * total else ()
                graphs = [name for name in between if _share(ways[name]) not in (0, 1)]
                for name in between:
                    if name not in graphs:
                        self._attempt(kind, name)
                if self._by_share(kind).keys() >= {0, 1}:
                    self._graphs[kind] = [n for n in graphs if n in self._forwards.menus[kind]]
                else:
                    # There is nothing to guess from.
                    for name in graphs:
                        self._attempt(kind, name)
                self._time(kind)
        if sum(map(len, self._graphs.values())) > _FEW:
            enough = min(_LITTLE_COMPILED * total, max(spreads.values()) / 2)
            little = [kind for kind in self._kinds if spreads[kind] < enough]
            self._graphs.update((kind, []) for kind in little)
        return self.choices()

    def measure_for(
        self, rooms: Sequence[int], assemble: Callable[[Choices], StepCosts]
    ) -> StepCosts:
        """Measures the graphs that make the step faster within one of these peaks, in bytes.

        Args:
            assemble: from costs of blocks to those of the step.
        """
        if rooms and sum(map(len, self._graphs.values())) <= _FEW:
            self._compile({kind: tuple(graphs) for kind, graphs in self._graphs.items()})
        kinds = {block.name: kind for kind, blocks in self._kinds.items() for block in blocks}
        while True:
            costs, hoped = assemble(self.choices()), assemble(self.choices(guessed=True))
            picks: dict[str, Counter[str]] = {}
            for room in rooms:
                now, then = solve(costs, room), solve(hoped, room)
                if then is None or (now and then.seconds > (1 - WORTH) * now.seconds):
                    continue
                for block, pick in zip(hoped.blocks, then.picks, strict=True):
                    kind, name = kinds[block.name], block.choices[pick].name
                    if name in self._graphs[kind]:
                        picks.setdefault(kind, Counter())[name] += 1
            if not picks:
                return costs
            # One of a kind, which makes guesses of the others better.
            self._compile(
                {kind: [max(names, key=names.__getitem__)] for kind, names in picks.items()}
            )

    def choices(self, *, guessed: bool = False) -> Choices:
        """What was measured.

        Args:
            guessed: with guesses of what may be.
        """
        found: Choices = {}
        for kind, blocks in self._kinds.items():
            known = self._found[kind]
            if guessed:
                known = known | {name: self._guess(kind, name) for name in self._graphs[kind]}
            ordered = {name: known[name] for name in self._names if name in known}
            for block in blocks:
                often = self._calls[block.name].times
                found[block.name] = {n: _repeated(choice, often) for n, choice in ordered.items()}
        return found

    def drop(self, name: str) -> None:
        """Forgets a way."""
        for known in self._found.values():
            known.pop(name, None)

    def _compile(self, wanted: Mapping[str, Collection[str]]) -> None:
        with long_lived_apart():
            for kind, names in wanted.items():
                for name in names:
                    self._attempt(kind, name)
                    self._graphs[kind].remove(name)
                if names:
                    self._time(kind)

    def _attempt(self, kind: str, name: str) -> None:
        if name not in self._forwards.menus[kind] or name in self._found[kind]:
            return
        block = self._forwards.blocks[kind]
        trial = Trial(self._forwards, block, name, self._calls[kind])
        try:
            self._found[kind][name] = measure_block(trial, self._meter)
        except (RuntimeError, HostMemoryError) as error:
            reason = _reason(error)
            if name == self._names[-1] or reason is None:
                raise
            trial.drop_gradients()
            self._say(f"memory: {kind} and its like cannot '{name}': {reason}")
        else:
            self._trials[kind][name] = trial

    def _time(self, kind: str) -> None:
        if self._meter.steady:
            return
        known = self._found[kind]
        times: dict[str, list[float]] = {name: [] for name in known}
        for _, name in itertools.product(range(_ROUNDS), known):
            times[name].append(self._trials[kind][name].seconds(self._meter))
        for name, seconds in times.items():
            known[name] = dataclasses.replace(known[name], seconds=statistics.median(seconds))

    def _spread(self, kind: str) -> float:
        """Bytes that the blocks keep under the first way and not the last; infinite: unknown."""
        known, most, least = self._found[kind], self._names[0], self._names[-1]
        if most not in known:
            return math.inf
        calls = sum(self._calls[block.name].times for block in self._kinds[kind])
        return float(calls * (known[most].kept_bytes - known[least].kept_bytes))

    def _guess(self, kind: str, name: str) -> Choice:
        return guess(name, _share(self._forwards.ways[name]), self._by_share(kind))

    def _by_share(self, kind: str) -> dict[float, Choice]:
        """What was measured of a compiled block, by what it keeps on the device."""
        ways = {name: self._forwards.ways[name] for name in self._found[kind]}
        return {_share(w): self._found[kind][n] for n, w in ways.items() if not w.offload}


def guess(name: str, share: float, known: Mapping[float, Choice]) -> Choice:
    """What keeping a share may cost, from what others do, 0 and 1 among them.

    Bytes lie on the straight line between the neighbours. The time lies below it, towards the least
    that a convex curve allows: that of keeping all, and of lines through two others on one side.
    """
    shares = sorted(known)
    at = bisect(shares, share)

    def on_line(field: str, a: int, b: int) -> float:
        """Through the shares at these places."""
        first, second = (getattr(known[shares[place]], field) for place in (a, b))
        return first + (share - shares[a]) / (shares[b] - shares[a]) * (second - first)

    chord, least = on_line("seconds", at - 1, at), known[1].seconds
    for a, b in ((at - 2, at - 1), (at, at + 1)):
        if a >= 0 and b < len(shares):
            least = max(least, on_line("seconds", a, b))
    fields = (f"{part}_bytes" for part in ("kept", "forward", "backward"))
    return Choice(
        name,
        *(round(on_line(field, at - 1, at)) for field in fields),
        seconds=chord - _HOPE * max(0.0, chord - least),
    )


def _share(way: Way) -> float:
    return 0.0 if way.recompute else way.share


def _reason(error: Exception) -> str | None:
    """Why a block cannot run a way; None where the way is not to blame."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, HostMemoryError):
        return "the host has too little memory"
    return "it works in place" if _IN_PLACE in str(error) else None


def _repeated(choice: Choice, times: int) -> Choice:
    """The cost of a block that is called several times before its backward."""
    kept = choice.kept_bytes
    return dataclasses.replace(
        choice,
        kept_bytes=times * kept,
        forward_bytes=(times - 1) * kept + choice.forward_bytes,
        seconds=times * choice.seconds,
        host_bytes=times * choice.host_bytes,
    )
