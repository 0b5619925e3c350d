import multiprocessing
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from fastft.config import DataConfig
from fastft.data import open_evaluation, open_loader
from fastft.errors import DataError
from fastft.task import Batch

CPU = torch.device("cpu")


def augment(sample: dict[str, Any]) -> dict[str, Any]:
    """Draws from the three global generators."""
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    return {**sample, "drawn": np.array(drawn)}


@pytest.fixture
def sources(write_npz: Callable):
    return (
        write_npz("small.npz", weight=2, x=np.arange(10.0), y=np.zeros(10, int)),
        write_npz("large.npz", x=np.arange(100, 190.0), y=np.ones(90, int)),
    )


def content(batches: Iterable[Batch], number: int | None = None) -> list[Any]:
    found = islice(batches, number)
    return [
        (
            batch.source,
            batch.size,
            {name: value.numpy().tobytes() for name, value in batch.data.items()},
        )
        for batch in found
    ]


@pytest.mark.parametrize("mixing", ["sample", "batch"])
def test_batches_depend_on_the_step_alone(adapter_of, sources, mixing):
    adapter = adapter_of(change=augment)
    config = DataConfig(train=sources, batch_size=8, mixing=mixing)
    loader = open_loader(adapter, config, seed=3, device=CPU)
    batches = content(loader.batches(), 20)
    assert len({batch[2]["drawn"] for batch in batches}) == 20
    assert {batch[0] for batch in batches} == ({""} if mixing == "sample" else {"small", "large"})
    for workers in (0, 2):
        other = DataConfig(train=sources, batch_size=8, mixing=mixing, workers=workers)
        with open_loader(adapter, other, seed=3, device=CPU) as again:
            assert content(again.batches(), 20) == batches
            assert content(again.batches(13), 7) == batches[13:]
    assert content(open_loader(adapter, config, seed=4, device=CPU).batches(), 20) != batches
    assert content([loader.example()]) == batches[:1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_training_are_left_alone(adapter_of, sources, workers):
    config = DataConfig(train=sources, batch_size=8, workers=workers)
    loader = open_loader(adapter_of(change=augment), config, seed=0, device=CPU)

    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return str((random.getstate(), numpy_state, torch.get_rng_state().tolist()))

    before = states()
    loader.example()
    content(loader.batches(), 3)
    assert states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_one_complete_pass_in_order(adapter_of, sources, workers):
    config = DataConfig(train=sources, evaluation_batch_size=32, workers=workers)
    loader = open_evaluation(adapter_of(change=augment), sources, config, device=CPU)
    batches = list(loader.batches())
    assert [(batch.source, batch.size) for batch in batches] == [
        ("small", 10),
        ("large", 32),
        ("large", 32),
        ("large", 26),
    ]
    given = torch.cat([batch["x"] for batch in batches])
    assert given.tolist() == [*range(10), *range(100, 190)]
    assert content(loader.batches()) == content(batches)
    assert content(loader.batches(2)) == content(batches[2:])
    assert loader.samples == 100
    assert loader.names == ("small", "large")
    assert [batch.source for batch in loader.examples()] == ["small", "large"]
    assert [batch["x"][0].item() for batch in loader.examples()] == [0, 100]


def test_a_batch_of_one_source_names_it(adapter_of, sources):
    config = DataConfig(train=sources[:1], batch_size=8)
    assert open_loader(adapter_of(), config, seed=0, device=CPU).example().source == "small"


def test_a_batch_must_fit_into_the_data(adapter_of, sources):
    config = DataConfig(train=sources, batch_size=101)
    with pytest.raises(DataError, match="must not exceed the 100 training samples; got 101"):
        open_loader(adapter_of(), config, seed=0, device=CPU)


def fail_on_zero(error: Exception) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["x"] == 0:
            raise error
        return sample

    return change


@pytest.mark.parametrize("workers", [0, 2])
def test_read_errors_arrive_as_data_errors(adapter_of, sources, workers):
    config = DataConfig(train=sources[:1], batch_size=5, workers=workers)
    adapter = adapter_of(change=fail_on_zero(OSError("disk is gone")))
    loader = open_loader(adapter, config, seed=0, device=CPU)
    with pytest.raises(DataError) as error:
        content(loader.batches(), 2)
    assert error.value.problems == (
        "small: sample 0: must be readable; got OSError: disk is gone; repair or remove it",
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_bugs_stay_what_they_are_and_leave_no_workers(adapter_of, sources, workers):
    config = DataConfig(train=sources[:1], batch_size=5, workers=workers)
    adapter = adapter_of(change=fail_on_zero(ZeroDivisionError("a bug")))
    loader = open_loader(adapter, config, seed=0, device=CPU)
    with pytest.raises(ZeroDivisionError) as error:
        content(loader.batches(), 2)
    notes = "".join([str(error.value), *getattr(error.value, "__notes__", ())])
    assert "while reading small: sample 0" in notes
    assert not multiprocessing.active_children()


def test_a_failing_collate_names_its_samples(adapter_of, write_npz):
    source = write_npz(x=np.arange(2.0))
    adapter = adapter_of(change=lambda sample: {"x": np.zeros(int(sample["x"]))})
    config = DataConfig(train=(source,), batch_size=2)
    loader = open_evaluation(adapter, [source], config, device=CPU)
    with pytest.raises(ValueError, match="same shape") as error:
        loader.example()
    assert error.value.__notes__ == ["while collating the samples data[0], data[1]"]


def test_no_workers_stay_behind(adapter_of, sources):
    config = DataConfig(train=sources, batch_size=8, workers=2)
    loader = open_loader(adapter_of(), config, seed=0, device=CPU)
    batches = loader.batches()
    next(iter(batches))
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert not multiprocessing.active_children()
    batches = loader.batches()
    next(iter(batches))
    del batches
    assert not multiprocessing.active_children()


KEPT_OPEN = """\
from pathlib import Path

import torch

from fastft.config import DataConfig, DataSource
from fastft.data import open_evaluation


class Adapter:
    def transform(self, sample, split):
        return sample

    def collate(self, samples):
        return {}

source = DataSource(path=Path("data.npz"))
data = DataConfig(train=(source,), batch_size=1, workers=2)
batches = open_evaluation(Adapter(), [source], data, device=torch.device("cpu")).batches()
next(batches)
raise ZeroDivisionError("a bug")
"""


def test_a_loader_that_nobody_closes_does_not_keep_the_program_from_ending(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.arange(99.0))
    process = subprocess.run(
        [sys.executable, "-c", KEPT_OPEN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 1
    assert process.stderr.endswith("ZeroDivisionError: a bug\n")
