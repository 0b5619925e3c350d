"""Which activations each block keeps: least step time whose peak memory fits a budget.

A dynamic programme from the last block to the first. What earlier blocks keep lies under every
moment of the later ones, so a plan for the blocks from i on is two numbers: the bytes it reaches
above what is allocated when block i begins, and its time. Plans worse in both are dropped. Those
left at the first block are the whole trade of peak against time, where a budget is looked up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


class _Costs:
    """Raises `ValueError` on negative bytes, seconds that are not finite, and empty choices."""

    def __post_init__(self) -> None:
        where = f"{type(self).__name__} {getattr(self, 'name', '')}".strip()
        problems: list[str] = []
        for name, value in vars(self).items():
            if name.endswith("_bytes") and value < 0:
                problems.append(f"{where}: {name} must be zero or more; got {value}")
            if name.endswith("seconds") and not math.isfinite(value):
                problems.append(f"{where}: {name} must be finite; got {value}")
            if name == "choices" and not value:
                problems.append(f"{where}: choices must be one or more; got none")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Choice(_Costs):
    """One way of keeping or recomputing the activations of a block. Bytes >= 0.

    `kept_bytes`: allocated from the end of its forward until its backward begins, with its output.
    `forward_bytes`: highest allocation during its forward above what was allocated when it began.
    `backward_bytes`: highest allocation during its backward, above all kept bytes (its own too)
    and the later blocks' gradients; has its own and the gradient that arrives at its output.
    `seconds`: forward, backward and recomputation.
    `host_bytes`: what of its activations waits on the host; no part of the others.
    """

    name: str
    kept_bytes: int
    forward_bytes: int
    backward_bytes: int
    seconds: float
    host_bytes: int = 0


@dataclass(frozen=True)
class BlockCosts(_Costs):
    """A block and its choices, at least one.

    `gradient_bytes`: parameter gradients that its backward leaves allocated until the update.
    """

    name: str
    choices: tuple[Choice, ...]
    gradient_bytes: int


@dataclass(frozen=True)
class StepCosts(_Costs):
    """A training step: its blocks in forward order, and all else that takes memory or time.

    `fixed_bytes`: always there; weights, optimizer state, buffers, batch, workspaces, slack.
    `before_bytes`: kept by what runs before the first block, to the end of its own backward.
    `before_backward_bytes`: transient of that before-part's backward, with its gradients.
    `tail_bytes`: highest allocation of heads and loss, forward and backward, above all kept.
    `tail_gradient_bytes`: their gradients, a part of `tail_bytes`, which stay until the update.
    `update_bytes`: transient of the optimizer update, with the before-part's gradients.
    `other_seconds`: the step's time outside the blocks.
    `update_seconds`: the part of it that is the update's, however many micro-batches there are.
    """

    blocks: tuple[BlockCosts, ...]
    fixed_bytes: int
    before_bytes: int
    before_backward_bytes: int
    tail_bytes: int
    tail_gradient_bytes: int
    update_bytes: int
    other_seconds: float
    update_seconds: float = 0.0


@dataclass(frozen=True)
class Moment:
    """The highest allocation of one part of a step: `bytes`, the sum of the four after it.

    `kept` are activations held for a later backward, `gradients` those of parameters.
    """

    label: str
    bytes: int
    fixed: int
    kept: int
    gradients: int
    transient: int


@dataclass(frozen=True)
class Solution:
    """`picks[i]` indexes the choices of block i; the peak and the time are the whole step's."""

    picks: tuple[int, ...]
    peak_bytes: int
    seconds: float


def timeline(costs: StepCosts, picks: Sequence[int]) -> tuple[Moment, ...]:
    """Every moment of the step in time order; raises `ValueError` on picks that do not fit."""
    moments: list[Moment] = []

    def add(label: str, *parts: int) -> None:
        moments.append(Moment(label, costs.fixed_bytes + sum(parts), costs.fixed_bytes, *parts))

    chosen = list(zip(costs.blocks, _chosen(costs, picks), strict=True))
    kept = costs.before_bytes
    for block, choice in chosen:
        add(f"forward {block.name}", kept, 0, choice.forward_bytes)
        kept += choice.kept_bytes
    add("heads and loss", kept, 0, costs.tail_bytes)
    gradients = costs.tail_gradient_bytes
    for block, choice in reversed(chosen):
        add(f"backward {block.name}", kept, gradients, choice.backward_bytes)
        kept -= choice.kept_bytes
        gradients += block.gradient_bytes
    add("backward before the blocks", kept, gradients, costs.before_backward_bytes)
    add("update", 0, gradients, costs.update_bytes)
    return tuple(moments)


def peak_bytes(costs: StepCosts, picks: Sequence[int]) -> int:
    """Highest moment of `timeline`."""
    return max(moment.bytes for moment in timeline(costs, picks))


def step_seconds(costs: StepCosts, picks: Sequence[int]) -> float:
    """Time of the step; correctly rounded, so no order of the blocks changes it."""
    return math.fsum([costs.other_seconds, *(c.seconds for c in _chosen(costs, picks))])


def host_bytes(costs: StepCosts, picks: Sequence[int]) -> int:
    """What all blocks have on the host at the end of the forward pass."""
    return sum(choice.host_bytes for choice in _chosen(costs, picks))


def solve(
    costs: StepCosts, budget_bytes: int, resolution_bytes: int | None = None
) -> Solution | None:
    """The fastest picks whose `peak_bytes` is at most `budget_bytes`; None where none fit.

    Equal times go to the lower peak, then to the lower index at the earliest block. At any
    `resolution_bytes` None means that nothing fits, and a larger budget is never slower. At 1 the
    result is exact; above, with n blocks, it is at least as fast as the exact one for
    `budget_bytes - n * resolution_bytes`. The default is a 4096th of the most the blocks can keep.
    """
    if resolution_bytes is None:
        most = sum(max(c.kept_bytes for c in block.choices) for block in costs.blocks)
        resolution_bytes = max(1, most // 4096)
    if resolution_bytes < 1:
        raise ValueError(f"resolution_bytes must be 1 or more; got {resolution_bytes}")
    ways = _ways(costs)
    fronts = _fronts(ways, costs.tail_bytes, resolution_bytes)
    base, floor = costs.fixed_bytes + costs.before_bytes, _floor_bytes(costs)
    fitting = [plan for plan in fronts[0].items() if base + plan[1] <= budget_bytes]
    if floor > budget_bytes or not fitting:
        return None
    ticks, above = min(fitting)
    picks = _walk(ways, fronts, ticks, max(floor - base, above))
    return Solution(picks, peak_bytes(costs, picks), step_seconds(costs, picks))


def smallest_peak(costs: StepCosts) -> tuple[int, tuple[int, ...]]:
    """The least peak in bytes that any picks reach, exactly, and the picks of `solve` for it."""
    above = costs.tail_bytes
    for block in reversed(_ways(costs)):
        above = min(max(own, kept + above) for own, kept, _ in block)
    peak = max(_floor_bytes(costs), costs.fixed_bytes + costs.before_bytes + above)
    solution = solve(costs, peak)
    assert solution is not None
    return peak, solution.picks


# A choice: its own highest bytes above the start of its block, its kept bytes, its ticks. Ticks
# are seconds as whole numbers of a common unit: sums are exact, so equal times are seen as equal.
_Way = tuple[int, int, int]
# Plans for the blocks from one on: ticks -> bytes above its start; fewer ticks, more bytes.
_Front = dict[int, int]


def _ways(costs: StepCosts) -> list[list[_Way]]:
    every = [choice for block in costs.blocks for choice in block.choices]
    unit = math.lcm(*(c.seconds.as_integer_ratio()[1] for c in every))
    ways: list[list[_Way]] = []
    gradients = costs.tail_gradient_bytes
    for block in reversed(costs.blocks):
        ways.append([])
        for c in block.choices:
            own = max(c.forward_bytes, c.kept_bytes + gradients + c.backward_bytes)
            top, below = c.seconds.as_integer_ratio()
            ways[-1].append((own, c.kept_bytes, top * (unit // below)))
        gradients += block.gradient_bytes
    return ways[::-1]


def _fronts(ways: list[list[_Way]], tail_bytes: int, resolution: int) -> list[_Front]:
    """The front of the blocks from i on at each i, and of the tail alone at the end."""
    fronts: list[_Front] = [{0: tail_bytes}]
    for block in reversed(ways):
        plans = sorted(
            (max(own, kept + later), ticks + rest)
            for own, kept, ticks in block
            for rest, later in fronts[-1].items()
        )
        front = plans[:1]
        for plan in plans:
            if plan[1] >= front[-1][1]:
                continue
            # The first plan always stays: it is what makes "nothing fits" exact.
            if len(front) > 1 and plan[0] // resolution == front[-1][0] // resolution:
                front.pop()
            front.append(plan)
        fronts.append({ticks: above for above, ticks in front})
    return fronts[::-1]


def _walk(ways: list[list[_Way]], fronts: list[_Front], ticks: int, above: int) -> tuple[int, ...]:
    """Lowest indices first, the picks that take exactly `ticks` and reach at most `above` bytes."""
    picks: list[int] = []
    for block, later in zip(ways, fronts[1:], strict=True):
        index = next(
            index
            for index, (own, kept, spent) in enumerate(block)
            if (rest := later.get(ticks - spent)) is not None and max(own, kept + rest) <= above
        )
        picks.append(index)
        above -= block[index][1]
        ticks -= block[index][2]
    return tuple(picks)


def _floor_bytes(costs: StepCosts) -> int:
    """Highest of the moments after the blocks, which no pick changes."""
    gradients = costs.tail_gradient_bytes + sum(block.gradient_bytes for block in costs.blocks)
    last = max(costs.before_bytes + costs.before_backward_bytes, costs.update_bytes)
    return costs.fixed_bytes + gradients + last


def _chosen(costs: StepCosts, picks: Sequence[int]) -> list[Choice]:
    sizes = [len(block.choices) for block in costs.blocks]
    if len(picks) != len(sizes) or not all(0 <= p < n for p, n in zip(picks, sizes, strict=True)):
        raise ValueError(f"picks must be one index for each block, below {sizes}; got {picks}")
    return [block.choices[pick] for block, pick in zip(costs.blocks, picks, strict=True)]
