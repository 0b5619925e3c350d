import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastft.errors import CheckpointError
from fastft.metrics import open_writer


def lines(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


def run(folder: Path, first: int, last: int, *, tensorboard: bool = False) -> None:
    with open_writer(folder, tensorboard=tensorboard, first_step=first) as writer:
        for step in range(first + 1, last + 1):
            writer.write(step, {"loss": step + first / 1000})


def test_a_line_is_on_disk_at_once_and_strict_json(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run", tensorboard=False, first_step=0) as writer:
        writer.write(3, {"loss": 0.5, "a": math.nan, "b": math.inf, "c": -math.inf, "n": 2})
        (line,) = lines(tmp_path / "run")
    assert line.pop("time") > 1.6e9
    assert line == {"step": 3, "loss": 0.5, "a": "nan", "b": "inf", "c": "-inf", "n": 2.0}
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 0, 7)
    run(tmp_path, 4, 6)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (5, 5.004),
        (6, 6.004),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    with open_writer(tmp_path, tensorboard=False, first_step=0) as writer:
        writer.write(0, {"loss": 1.0})
    run(tmp_path, 0, 1)
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b"{", b"\xff\x00\xc3", b"12", b'{"a": 1}'])
def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path: Path, caplog, torn) -> None:
    run(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    run(tmp_path, 3, 5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert "dropped 1 unreadable line" in caplog.text


def test_a_failed_rewrite_leaves_the_old_log(tmp_path: Path, monkeypatch) -> None:
    run(tmp_path, 0, 3)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: must be written whole; got disk"):
        open_writer(tmp_path, tensorboard=False, first_step=1)
    assert steps(tmp_path) == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more into any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_one_error(tmp_path: Path, tensorboard: bool) -> None:
    def write_on() -> None:
        with (
            open_writer(tmp_path, tensorboard=tensorboard, first_step=0) as writer,
            largest_file(1000),
        ):
            for step in range(1, 1000):
                writer.write(step, {"loss": 1.0})

    with pytest.raises(CheckpointError, match="whole; got File too large") as caught:
        write_on()
    assert len(caught.value.problems) == 1
    assert 2 < len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) < 50
    # A line cut short is dropped on going on.
    run(tmp_path, 2, 3)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_full_disk_when_tensorboard_begins(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="File too large"), largest_file(0):
        open_writer(tmp_path, tensorboard=True, first_step=0)


def test_texts_and_closing_say_that_the_disk_is_full(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, tensorboard=True, first_step=0)
    with largest_file(1000):
        with pytest.raises(CheckpointError, match="File too large"):
            writer.text("run", "long" * 1000)
        with pytest.raises(CheckpointError, match="File too large"):
            writer.close()


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    run(tmp_path, 0, 7, tensorboard=True)
    run(tmp_path, 4, 6, tensorboard=True)
    with open_writer(tmp_path, tensorboard=True, first_step=6) as writer:
        writer.text("run", "| a | b |")
        writer.write(7, {"loss": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.value for event in scalars[3:6]] == pytest.approx([4.0, 5.004, 6.004])
    assert math.isnan(scalars[6].value)
    assert "run/text_summary" in events.Tags()["tensors"]


def test_a_text_without_tensorboard_goes_nowhere(tmp_path: Path) -> None:
    with open_writer(tmp_path, tensorboard=False, first_step=0) as writer:
        writer.text("run", "text")
    assert steps(tmp_path) == []
