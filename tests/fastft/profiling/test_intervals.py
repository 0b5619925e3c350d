"""Interval arithmetic against counting points."""

from hypothesis import given
from hypothesis import strategies as st

from fastft.profiling.intervals import Interval, difference, exclusive, intersection, length, union

intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: tuple(sorted(pair)))
)


def points(found: list[Interval]) -> set[int]:
    """The unit stretches that intervals cover."""
    return {point for start, end in found for point in range(int(start), int(end))}


@given(intervals, intervals)
def test_sets(first: list[Interval], second: list[Interval]) -> None:
    a, b = union(first), union(second)
    assert points(a) == points(first)
    assert length(a) == len(points(first))
    assert points(intersection(a, b)) == points(a) & points(b)
    assert length(intersection(a, b)) == len(points(a) & points(b))
    assert points(difference(a, b)) == points(a) - points(b)
    assert length(difference(a, b)) == len(points(a) - points(b))


@given(intervals.map(sorted))
def test_exclusive_parts_cover_everything_once(found: list[Interval]) -> None:
    parts = exclusive(found)
    assert len(parts) == len(found)
    assert points(parts) == points(found)
    assert length(parts) == len(points(found))
