import time
from collections import Counter
from itertools import islice
from typing import Literal

import numpy as np
import pytest

from fastft.data.order import WINDOW, EvaluationOrder, Picks, TrainingOrder

Mixing = Literal["sample", "batch"]


def make_order(
    mixing: Mixing = "sample",
    sizes: tuple[int, ...] = (40, 7, 500),
    weights: tuple[float, ...] = (1, 3, 6),
    seed: int = 0,
) -> TrainingOrder:
    return TrainingOrder(sizes, weights, 16, mixing, seed)


def plain(picks: Picks) -> tuple[int, list[int], list[int]]:
    return picks.first, picks.sources.tolist(), picks.indices.tolist()


def test_one_source_covers_every_sample_once_per_pass_across_batches():
    order = make_order(sizes=(37,), weights=(2,))
    stream = np.concatenate([picks.indices for picks in islice(order.batches(), 37)])
    passes = stream.reshape(16, 37)
    assert all(sorted(indices) == list(range(37)) for indices in passes.tolist())
    assert len({tuple(indices) for indices in passes.tolist()}) == 16


@pytest.mark.parametrize("mixing", ["sample", "batch"])
def test_every_source_covers_its_samples_once_per_pass(mixing: Mixing):
    order = make_order(mixing)
    given: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for picks in islice(order.batches(), 500):
        for source, index in zip(picks.sources.tolist(), picks.indices.tolist(), strict=True):
            given[source].append(index)
    for source, size in enumerate(order.sizes):
        whole = len(given[source]) // size
        assert whole > 1
        for number in range(whole):
            indices = given[source][number * size : (number + 1) * size]
            assert sorted(indices) == list(range(size))


@pytest.mark.parametrize("mixing", ["sample", "batch"])
def test_sources_come_up_by_weight(mixing: Mixing):
    counts = Counter[int]()
    steps = 4000
    for picks in islice(make_order(mixing).batches(), steps):
        counts.update(picks.sources.tolist())
        assert mixing == "sample" or len(set(picks.sources.tolist())) == 1
    draws = steps * (16 if mixing == "sample" else 1)
    for source, share in enumerate((0.1, 0.3, 0.6)):
        # Five standard deviations of a binomial share.
        tolerance = 5 * np.sqrt(share * (1 - share) / draws)
        assert abs(counts[source] / (steps * 16) - share) < tolerance


def test_the_number_of_a_source_within_batches_varies_as_independent_draws_do():
    batches = islice(make_order().batches(), 4000)
    numbers = np.array([(picks.sources == 2).sum() for picks in batches])
    assert numbers.var() == pytest.approx(16 * 0.6 * 0.4, rel=0.15)


@pytest.mark.parametrize("mixing", ["sample", "batch"])
@pytest.mark.parametrize("first", [0, 1, WINDOW - 1, WINDOW, 3 * WINDOW + 5])
def test_a_restart_gives_the_tail(mixing: Mixing, first: int):
    order = make_order(mixing)
    whole = [plain(picks) for picks in islice(order.batches(), first + 20)]
    assert [plain(picks) for picks in islice(order.batches(first), 20)] == whole[first:]


def test_seeds_differ():
    first, second = (next(make_order(seed=seed).batches()) for seed in (0, 1))
    assert plain(first) != plain(second)


@pytest.mark.parametrize("mixing", ["sample", "batch"])
def test_a_late_start_is_fast(mixing: Mixing):
    started = time.perf_counter()
    picks = next(make_order(mixing).batches(1_000_000))
    assert picks.first == 16_000_000
    assert time.perf_counter() - started < 2


def test_evaluation_covers_all_in_order_one_source_per_batch():
    order = EvaluationOrder((5, 3), 2)
    batches = [plain(picks) for picks in order.batches()]
    assert batches == [
        (0, [0, 0], [0, 1]),
        (2, [0, 0], [2, 3]),
        (4, [0], [4]),
        (5, [1, 1], [0, 1]),
        (7, [1], [2]),
    ]
    assert [plain(picks) for picks in order.batches(3)] == batches[3:]
