"""A replay buffer's draws, and what is kept for them."""

import dataclasses
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastft.assemble import make_replay
from fastft.config import DataConfig, DataSource, ReplayConfig
from fastft.data import open_loader
from fastft.data.order import TrainingOrder
from fastft.data.replay import ReplayOrder
from fastft.errors import ConfigError
from fastft.replay import ReplayBuffer
from fastft.task import Batch, Loss, Task

CPU = torch.device("cpu")


def make_order(batch_size: int = 2, **settings: int) -> ReplayOrder:
    # The first data set in one run of samples, the second in pairs.
    following = np.append(np.arange(1, 50), -1), np.array([1, -1, 3, -1])
    fresh = TrainingOrder((50, 4), (1, 1), 1, "sample", 0)
    buffer = dataclasses.replace(ReplayConfig(size=6, refresh=4, longest=5), **settings)
    return ReplayOrder(fresh, following, batch_size, buffer)


def test_a_sample_is_carried_on_until_it_ends() -> None:
    order = make_order()
    fresh = (picks for picks in order.fresh.batches())
    held: dict[int, tuple[int, int, int]] = {}
    seen = set()
    for number, picks in enumerate(islice(order.batches(), 300)):
        if number and number % 4 == 0:
            held.pop((number // 4 - 1) % 6, None)
        assert picks.first == 2 * number
        assert len(set(picks.slots)) == 2
        for slot, source, index, lead in zip(
            picks.slots, picks.sources, picks.indices, picks.leads, strict=True
        ):
            expected = held.pop(slot, None)
            if expected is None:
                first = next(fresh)
                expected = int(first.sources[0]), int(first.indices[0]), 0
            assert (source, index, lead) == expected
            seen.add((int(source), lead))
            after = int(order.following[source][index])
            if after >= 0 and lead < 4:
                held[slot] = int(source), after, lead + 1
    assert seen == {(0, lead) for lead in range(5)} | {(1, 0), (1, 1)}


def test_starting_late_gives_the_same() -> None:
    order = make_order()
    every = list(islice(order.batches(), 40))
    late = list(islice(order.batches(first=25), 15))
    for a, b in zip(every[25:], late, strict=True):
        assert (a.first, a.slots, a.leads) == (b.first, b.slots, b.leads)
        assert (a.indices == b.indices).all()
    other = list(islice(make_order(refresh=5).batches(), 40))
    assert [picks.leads for picks in other] != [picks.leads for picks in every]


class Count:
    """A sample's state counts what it has been through."""

    def start(self, batch: Batch, states: Any) -> Batch:
        data = {"x": torch.stack([torch.zeros(1) if s is None else s for s in states])}
        return Batch(data, batch.size, slots=batch.slots, leads=batch.leads)

    def states(self, batch: Batch, predictions: Any) -> list[torch.Tensor]:
        return list(predictions)


@pytest.mark.parametrize("saved", [True, False])
def test_states_come_back_one_step_later(saved: bool) -> None:
    buffer = ReplayBuffer(Count(), CPU, saved=saved)
    batches = [
        Batch({}, len(picks.slots), slots=picks.slots, leads=picks.leads)
        for picks in islice(make_order().batches(), 40)
    ]
    for number, batch in enumerate(batches):
        if number == 20:
            state = buffer.state_dict()
            assert bool(state) == saved
            buffer = ReplayBuffer(Count(), CPU, saved=saved)
            buffer.load_state_dict(state)
        filled = buffer.fill(batch)
        steps = filled["x"][:, 0].int().tolist()
        if saved or number < 20:
            assert steps == list(batch.leads)
        else:
            # From data where the buffer is lost, at the same places.
            assert all(a <= b for a, b in zip(steps, batch.leads, strict=True))
        buffer.keep(filled, filled["x"] + 1)


class Rows:
    following = np.array([1, 2, 3, -1])

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {"x": np.float32(index)}


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers: int, tmp_path: Path, adapter_of: Any) -> None:
    adapter = adapter_of(open=lambda source: Rows())
    source = DataSource(path=tmp_path, format="adapter", name="rows")
    replay = ReplayConfig(size=3, refresh=2, longest=3)
    data = DataConfig(train=(source,), batch_size=2, replay=replay, workers=workers)
    with open_loader(adapter, data, seed=0, device=CPU) as loader:
        batches = list(islice(loader.batches(first=3), 8))
    again = open_loader(adapter, data, seed=0, device=CPU)
    for batch, picks in zip(batches, again._order.batches(first=3), strict=False):
        assert batch["x"].tolist() == picks.indices.tolist()
        assert (batch.slots, batch.leads) == (picks.slots, picks.leads)
    assert {lead for batch in batches for lead in batch.leads} == {0, 1, 2}
    assert batches[0].to(CPU).leads == batches[0].leads


class Alone(Rows):
    following = np.full(4, -1)


def test_data_that_follow_nothing(
    write_npz: Callable[..., DataSource], tmp_path: Path, adapter_of: Any
) -> None:
    data = DataConfig(train=(write_npz(x=np.zeros(4)),), batch_size=2, replay=ReplayConfig())
    with pytest.raises(
        ConfigError, match=r"must say which sample follows which .*got none from data"
    ):
        open_loader(adapter_of(), data, seed=0, device=CPU)
    adapter = adapter_of(open=lambda source: Alone())
    alone = DataConfig(
        train=(DataSource(path=tmp_path, format="adapter"),), batch_size=2, replay=ReplayConfig()
    )
    with pytest.raises(
        ConfigError, match=r"must follow each other by one step .* got none that does"
    ):
        open_loader(adapter, alone, seed=0, device=CPU)
    small = ReplayConfig(size=1)
    with pytest.raises(ValueError, match=r"size must be at least that of a batch; got 1 and 2"):
        DataConfig(train=data.train, batch_size=2, replay=small)
    with pytest.raises(ValueError, match=r"size must be at least that of a batch; got 1 and 8"):
        DataConfig(train=data.train, batch_size="fit", samples_per_step=8, replay=small)
    with pytest.raises(ValueError, match=r"mixes data sets within a batch; got mixing 'batch'"):
        DataConfig(train=data.train, mixing="batch", replay=ReplayConfig())


def test_predictions_that_are_no_data() -> None:
    task = Task(torch.nn.Identity(), lambda model, batch: Loss(batch["x"].sum()))
    config = SimpleNamespace(
        data=SimpleNamespace(replay=ReplayConfig()), model=SimpleNamespace(adapter="timm")
    )
    with pytest.raises(
        ConfigError, match=r"since predictions of adapter 'timm' do not become data"
    ):
        make_replay(cast(Any, config), task, CPU)
    assert isinstance(
        make_replay(cast(Any, config), dataclasses.replace(task, carry=Count()), CPU), ReplayBuffer
    )
    config.data.replay = None
    assert make_replay(cast(Any, config), task, CPU) is None
