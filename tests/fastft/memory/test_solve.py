"""The memory solver against brute force, and by hand."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fastft.memory.solve import (
    BlockCosts,
    Choice,
    Moment,
    Solution,
    StepCosts,
    peak_bytes,
    smallest_peak,
    solve,
    step_seconds,
    timeline,
)


def step(*blocks: BlockCosts, **other: int) -> StepCosts:
    parts = {
        "fixed_bytes": 0,
        "before_bytes": 0,
        "before_backward_bytes": 0,
        "tail_bytes": 0,
        "tail_gradient_bytes": 0,
        "update_bytes": 0,
    }
    return StepCosts(blocks, other_seconds=0.0, **(parts | other))


# Few and small values, so that ties and dominated plans are common; the floats do not add exactly.
few = st.integers(0, 12)
spent = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1.0])
choice = st.builds(
    lambda kept, forward, backward, seconds: Choice("c", kept, kept + forward, backward, seconds),
    few,
    few,
    st.integers(0, 20),
    spent,
)
block = st.builds(
    BlockCosts, st.just("b"), st.lists(choice, min_size=1, max_size=3).map(tuple), few
)
steps = st.builds(
    StepCosts, st.lists(block, max_size=5).map(tuple), few, few, few, few, few, few, spent
)
budgets = st.integers(0, 150)


def all_picks(costs: StepCosts) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(block.choices)) for block in costs.blocks)))


def brute_force(costs: StepCosts, budget: int) -> Solution | None:
    """The definition: time, then peak, then picks. Times are compared as exact fractions."""

    def exact(picks: tuple[int, ...]) -> int:
        chosen = [b.choices[p].seconds for b, p in zip(costs.blocks, picks, strict=True)]
        ratios = [seconds.as_integer_ratio() for seconds in chosen]
        return sum(top * 2**60 // below for top, below in ratios)

    ranked = [
        (exact(picks), peak_bytes(costs, picks), picks)
        for picks in all_picks(costs)
        if peak_bytes(costs, picks) <= budget
    ]
    if not ranked:
        return None
    _, peak, picks = min(ranked)
    return Solution(picks, peak, step_seconds(costs, picks))


@settings(max_examples=300, deadline=None)
@given(steps, budgets)
@example(step(), 0)
def test_resolution_1_is_brute_force(costs: StepCosts, budget: int):
    found = solve(costs, budget, resolution_bytes=1)
    assert found == brute_force(costs, budget)
    fitting = [p for p in all_picks(costs) if peak_bytes(costs, p) <= budget]
    assert (found is None) == (not fitting)
    if found is not None:
        assert found.seconds == min(step_seconds(costs, picks) for picks in fitting)


@settings(deadline=None)
@given(steps)
def test_smallest_peak_is_brute_force(costs: StepCosts):
    peak, picks = smallest_peak(costs)
    assert peak == min(peak_bytes(costs, picks) for picks in all_picks(costs))
    assert Solution(picks, peak, step_seconds(costs, picks)) == brute_force(costs, peak)


@settings(deadline=None)
@given(steps, budgets, st.integers(1, 30))
def test_a_coarse_resolution_still_fits(costs: StepCosts, budget: int, resolution: int):
    found = solve(costs, budget, resolution)
    assert (found is None) == (brute_force(costs, budget) is None)
    assume(found is not None)
    assert found is not None
    assert found.peak_bytes == peak_bytes(costs, found.picks) <= budget
    assert found.seconds == step_seconds(costs, found.picks)
    tighter = brute_force(costs, budget - len(costs.blocks) * resolution)
    assert tighter is None or found.seconds <= tighter.seconds


@settings(deadline=None)
@given(steps, budgets, budgets, st.integers(1, 30))
def test_a_larger_budget_is_never_slower(costs: StepCosts, one: int, other: int, resolution: int):
    small, large = (solve(costs, budget, resolution) for budget in sorted((one, other)))
    if small is not None:
        assert large is not None
        assert large.seconds <= small.seconds


@settings(deadline=None)
@given(steps, st.data())
def test_timeline(costs: StepCosts, data: st.DataObject):
    picks = data.draw(st.sampled_from(all_picks(costs)))
    moments = timeline(costs, picks)
    assert len(moments) == 2 * len(costs.blocks) + 3
    assert max(moment.bytes for moment in moments) == peak_bytes(costs, picks)
    for moment in moments:
        parts = moment.fixed + moment.kept + moment.gradients + moment.transient
        assert moment.bytes == parts


def large_step(seed: int) -> StepCosts:
    """48 blocks of 6 choices with bytes as of a real model; keeping less costs more time."""
    draw = random.Random(seed)
    blocks: list[BlockCosts] = []
    for index in range(48):
        choices: list[Choice] = []
        for way in range(6):
            kept = draw.randrange(2_000_000, 900_000_000)
            forward = kept + draw.randrange(200_000_000)
            seconds = 3e-3 + (1 - kept / 9e8) * draw.uniform(0.7e-3, 1.3e-3)
            choices.append(
                Choice(f"way {way}", kept, forward, draw.randrange(900_000_000), seconds)
            )
        blocks.append(BlockCosts(f"block {index}", tuple(choices), 50_000_000))
    return StepCosts(tuple(blocks), 10**10, 10**8, 10**8, 10**9, 10**7, 10**9, 0.1)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_step(seed: int):
    costs = large_step(seed)
    least, picks = smallest_peak(costs)
    assert peak_bytes(costs, picks) == least
    assert solve(costs, least - 1) is None
    fastest = [min(range(6), key=lambda way: b.choices[way].seconds) for b in costs.blocks]
    most = peak_bytes(costs, fastest)
    before = math.inf
    for budget in [*range(least, most, (most - least) // 8), most]:
        found = solve(costs, budget)
        assert found is not None
        assert found.peak_bytes == peak_bytes(costs, found.picks) <= budget
        assert found.seconds <= before
        before = found.seconds
    assert before == step_seconds(costs, fastest)


def test_equal_large_blocks():
    costs = large_step(0)
    costs = replace(costs, blocks=costs.blocks[:1] * 48)
    least, _ = smallest_peak(costs)
    found = solve(costs, 2 * least)
    assert found is not None
    assert least < found.peak_bytes <= 2 * least


KEEP = Choice("keep", kept_bytes=40, forward_bytes=50, backward_bytes=30, seconds=1.0)
REDO = Choice("redo", kept_bytes=10, forward_bytes=50, backward_bytes=65, seconds=1.5)
HAND = StepCosts(
    blocks=(
        BlockCosts("first", (KEEP, REDO), gradient_bytes=6),
        BlockCosts("second", (KEEP, REDO), gradient_bytes=7),
    ),
    fixed_bytes=1000,
    before_bytes=5,
    before_backward_bytes=20,
    tail_bytes=25,
    tail_gradient_bytes=3,
    update_bytes=60,
    other_seconds=0.25,
)


def test_timeline_by_hand():
    assert timeline(HAND, (0, 1)) == (
        Moment("forward first", 1055, 1000, 5, 0, 50),
        Moment("forward second", 1095, 1000, 45, 0, 50),
        Moment("heads and loss", 1080, 1000, 55, 0, 25),
        Moment("backward second", 1123, 1000, 55, 3, 65),
        Moment("backward first", 1085, 1000, 45, 10, 30),
        Moment("backward before the blocks", 1041, 1000, 5, 16, 20),
        Moment("update", 1076, 1000, 0, 16, 60),
    )


def test_solve_by_hand():
    # Backward of the second block is 1000 + 5 + 80 + 3 + 30 with both kept; the first redone
    # takes 30 off it, and its own backward is then 1000 + 5 + 10 + 3 + 7 + 65.
    assert peak_bytes(HAND, (0, 0)) == 1118
    assert peak_bytes(HAND, (1, 0)) == 1090
    assert peak_bytes(HAND, (0, 1)) == 1123
    assert peak_bytes(HAND, (1, 1)) == 1093
    assert solve(HAND, 1118) == Solution((0, 0), 1118, 2.25)
    assert solve(HAND, 1117) == Solution((1, 0), 1090, 2.75)
    assert solve(HAND, 1089) is None
    assert smallest_peak(HAND) == (1090, (1, 0))


def two_blocks(gradient_bytes: int, tail_bytes: int) -> StepCosts:
    keep = Choice("keep", 10, 10, 2 + gradient_bytes, 1.0)
    redo = Choice("redo", 2, 10, 12 + gradient_bytes, 1.5)
    blocks = (BlockCosts(name, (keep, redo), gradient_bytes) for name in ("early", "late"))
    return step(*blocks, tail_bytes=tail_bytes)


def test_small_gradients_recompute_the_early_block():
    # What the early block drops is missing under all that follows, and its own recomputation
    # comes when the late block is gone: 14 bytes against 24.
    costs = two_blocks(gradient_bytes=0, tail_bytes=0)
    assert (peak_bytes(costs, (1, 0)), peak_bytes(costs, (0, 1))) == (14, 24)
    assert solve(costs, 20) == Solution((1, 0), 14, 2.5)


def test_large_gradients_recompute_the_late_block():
    # By the early block's backward the gradients of the late one weigh more than its activations
    # did, so the recomputation is cheaper late: 53 bytes, of the tail, against 54.
    costs = two_blocks(gradient_bytes=20, tail_bytes=41)
    assert (peak_bytes(costs, (1, 0)), peak_bytes(costs, (0, 1))) == (54, 53)
    assert solve(costs, 60) == Solution((0, 1), 53, 2.5)
    assert solve(costs, 53) == Solution((0, 1), 53, 2.5)


def test_a_tie_goes_to_the_lower_peak_then_to_the_lower_index_early():
    heavy, light = Choice("heavy", 9, 9, 0, 1.0), Choice("light", 4, 9, 0, 1.0)
    lower = step(BlockCosts("only", (heavy, light), 0))
    # The forward's 9 bytes are the peak either way, until a tail comes on top.
    assert solve(lower, 100) == Solution((0,), 9, 1.0)
    assert solve(replace(lower, tail_bytes=2), 100) == Solution((1,), 9, 1.0)
    # One of two equal blocks must be redone for the tail; both ways cost the same.
    keep, redo = Choice("keep", 10, 10, 0, 1.0), Choice("redo", 2, 2, 0, 1.5)
    pair = step(*[BlockCosts("b", (keep, redo), 0)] * 2, tail_bytes=30)
    assert solve(pair, 45) == Solution((0, 1), 42, 2.5)


def test_a_dominating_transient_decides():
    # 99 bytes of transient: the third block's faster way cannot run on top of two kept blocks.
    small = (Choice("keep", 10, 10, 0, 1.0), Choice("redo", 0, 10, 10, 2.0))
    wide = (Choice("fast", 10, 99, 0, 1.0), Choice("slow", 10, 20, 0, 2.5))
    costs = step(BlockCosts("a", small, 0), BlockCosts("b", small, 0), BlockCosts("c", wide, 0))
    assert solve(costs, 119) == Solution((0, 0, 0), 119, 3.0)
    assert solve(costs, 109) == Solution((0, 1, 0), 109, 4.0)
    assert solve(costs, 108) == Solution((0, 0, 1), 40, 4.5)


def test_no_blocks():
    costs = step(fixed_bytes=10, before_bytes=2, tail_bytes=5, update_bytes=8)
    assert [m.label for m in timeline(costs, ())] == [
        "heads and loss",
        "backward before the blocks",
        "update",
    ]
    assert solve(costs, 18) == Solution((), 18, 0.0)
    assert solve(costs, 17) is None
    assert smallest_peak(costs) == (18, ())


def test_zero_bytes_and_one_choice():
    costs = step(*[BlockCosts("b", (Choice("c", 0, 0, 0, 0.0),), 0)] * 3)
    assert solve(costs, 0) == Solution((0, 0, 0), 0, 0.0)
    assert solve(costs, -1) is None
    assert smallest_peak(costs) == (0, (0, 0, 0))


def test_the_update_alone_can_be_too_large():
    costs = step(BlockCosts("b", (KEEP, REDO), 5), update_bytes=200)
    assert solve(costs, 204) is None
    # Nothing is gained below the update's peak, so the fast way is picked.
    assert smallest_peak(costs) == (205, (0,))


def test_values_that_cannot_be():
    with pytest.raises(ValueError, match="Choice c: kept_bytes must be zero or more; got -1") as e:
        Choice("c", -1, 0, -2, math.nan)
    assert "backward_bytes must be zero or more; got -2" in str(e.value)
    assert "seconds must be finite; got nan" in str(e.value)
    with pytest.raises(ValueError, match="BlockCosts b: choices must be one or more; got none"):
        BlockCosts("b", (), 0)
    with pytest.raises(ValueError, match="gradient_bytes must be zero or more; got -1"):
        BlockCosts("b", (KEEP,), -1)
    with pytest.raises(ValueError, match="StepCosts: update_bytes must be zero or more; got -1"):
        step(update_bytes=-1)
    with pytest.raises(ValueError, match="resolution_bytes must be 1 or more; got 0"):
        solve(HAND, 2000, 0)


@pytest.mark.parametrize("picks", [(), (0,), (0, 2), (0, -1), (0, 0, 0)])
def test_picks_that_do_not_match(picks: tuple[int, ...]):
    for function in (timeline, peak_bytes, step_seconds):
        with pytest.raises(ValueError, match="picks must be one index for each block"):
            function(HAND, picks)
