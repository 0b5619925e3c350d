"""Arithmetic on intervals of time: pairs (start, end), sorted, in any one unit."""

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint sorted intervals that cover the same points; empty ones are dropped."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """The summed length."""
    return sum(end - start for start, end in intervals)


def intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """What two unions have in common."""
    found: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(whole: Sequence[Interval], removed: Sequence[Interval]) -> list[Interval]:
    """What remains of a union without another."""
    left: list[Interval] = []
    j = 0
    for start, end in whole:
        while j < len(removed) and removed[j][1] <= start:
            j += 1
        at, k = start, j
        while k < len(removed) and removed[k][0] < end:
            if removed[k][0] > at:
                left.append((at, removed[k][0]))
            at = max(at, removed[k][1])
            k += 1
        if at < end:
            left.append((at, end))
    return left


def exclusive(intervals: Sequence[Interval]) -> list[Interval]:
    """Each interval without what earlier ones cover, in the order given.

    Intervals must be sorted by start. The results do not overlap and together cover the union: time
    in which two kernels run is counted once, for the one that began first.
    """
    result, covered = [], float("-inf")
    for start, end in intervals:
        begin = max(start, covered)
        result.append((begin, max(begin, end)))
        covered = max(covered, end)
    return result
