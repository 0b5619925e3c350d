"""Saving a run: whole or not at all, the last few and the best, and damage found on loading."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastft.atomic import write_file_atomically
from fastft.checkpoint import (
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from fastft.errors import CheckpointError

STATE = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)}
TRAINING = {"rng": torch.get_rng_state(), "optimizer": {"state": {0: {"m": torch.ones(2)}}}}


def save(run: Path, step: int, loss: float | None = None, **options: Any) -> Path:
    metrics = {} if loss is None else {"loss": loss}
    state = {"a": torch.full((3,), float(step))}
    return save_checkpoint(run, step, state, TRAINING, {"metrics": metrics}, **options)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def test_round_trip(tmp_path: Path):
    tied = {"_orig_mod.x.weight": STATE["a"], "y._orig_mod.weight": STATE["a"], "extra": {"k": 1}}
    meta = {"metrics": {"loss": torch.tensor(0.5), "acc": 0.9}, "versions": {"timm": "1.0"}}
    path = save_checkpoint(tmp_path, 123, tied, TRAINING, meta, ema_state=STATE)  # type: ignore[arg-type]
    assert path == tmp_path / "checkpoints" / "step-00000123"
    assert latest_checkpoint(tmp_path) == best_checkpoint(tmp_path) == path
    saved = load_checkpoint(path)
    assert saved.model.keys() == {"x.weight", "y.weight"}
    assert torch.equal(saved.model["y.weight"], STATE["a"])
    assert saved.ema is not None
    assert saved.ema.keys() == STATE.keys()
    assert saved.ema["b"].dtype == torch.int64
    assert torch.equal(saved.training["rng"], TRAINING["rng"])
    assert saved.training["optimizer"]["state"][0]["m"].tolist() == [1, 1]
    assert saved.meta["step"] == 123
    assert saved.meta["value"] == 0.5
    assert saved.meta["metrics"] == {"loss": 0.5, "acc": 0.9}
    assert saved.meta["versions"].keys() == {"fastft", "torch", "python", "timm"}
    assert torch.load(path / "training.pt", weights_only=True).keys() == TRAINING.keys()


def test_training_state_that_could_not_be_loaded_is_refused_when_saving(tmp_path: Path):
    with pytest.raises(TypeError, match="PosixPath"):
        save_checkpoint(tmp_path, 1, STATE, {"where": Path("x")}, {})
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    ("losses", "mode", "kept"),
    [
        ([5.0, 1.0, 3.0, 4.0, 2.0], "min", [2, 4, 5]),
        ([5.0, 1.0, 3.0, 4.0, 2.0], "max", [1, 4, 5]),
        ([5.0, 4.0, 3.0, 2.0, 1.0], "min", [4, 5]),
        ([2.0, math.nan, math.nan, 3.0, math.inf], "min", [1, 4, 5]),
        ([math.nan] * 5, "min", [4, 5]),
        ([None, 2.0, None, None, None], "min", [2, 4, 5]),
    ],
)
def test_keeps_the_last_and_the_best(tmp_path: Path, losses: list, mode: Any, kept: list[int]):
    for step, loss in enumerate(losses, 1):
        save(tmp_path, step, loss, mode=mode)
    assert steps(tmp_path) == kept
    best = best_checkpoint(tmp_path)
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not finite:
        assert best is None
    else:
        assert best is not None
        assert read_meta(best)["value"] == (min if mode == "min" else max)(finite)


def test_keep_last_one_keeps_a_new_checkpoint_of_an_earlier_step(tmp_path: Path):
    for step in (10, 20, 30, 5):
        path = save(tmp_path, step, keep_last=1)
        assert path.exists()
    assert steps(tmp_path) == [5, 30]


def test_the_latest_monitor_decides_which_is_best(tmp_path: Path):
    for step, (loss, acc) in enumerate([(1.0, 0.2), (2.0, 0.9), (3.0, 0.5)], 1):
        meta = {"metrics": {"loss": loss, "acc": acc}}
        monitor, mode = ("acc", "max") if step == 3 else ("loss", "min")
        save_checkpoint(
            tmp_path,
            step,
            STATE,
            {},
            meta,
            keep_last=5,
            monitor=monitor,
            mode=mode,  # type: ignore[arg-type]
        )
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "step-00000002"


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    save(tmp_path, 1, 1.0)
    path = save_checkpoint(tmp_path, 1, STATE, {}, {"note": "again"})
    assert read_meta(path)["note"] == "again"
    assert steps(tmp_path) == [1]


def test_no_checkpoint(tmp_path: Path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert best_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="must describe a checkpoint of fastft"):
        load_checkpoint(tmp_path)


def _in_child(action: Callable[[], object], killed_at_call: int) -> bool:
    """Runs `action` in a forked child that dies, as by SIGKILL, at its n-th call of these.

    Returns:
        Whether it was killed before it finished.
    """
    child = os.fork()
    if child == 0:
        left = killed_at_call

        def deadly(function: Callable) -> Callable:
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path):
    moment, killed = 0, True
    while killed:
        run = tmp_path / str(moment)
        for step in (1, 2):
            save(run, step, float(step))
        killed = _in_child(lambda run=run: save(run, 3, 3.0), killed_at_call=moment)
        latest, best = latest_checkpoint(run), best_checkpoint(run)
        assert latest is not None
        assert best is not None
        step = read_meta(latest)["step"]
        assert step in (2, 3)
        assert load_checkpoint(latest).model["a"].tolist() == [step] * 3
        assert load_checkpoint(best).model["a"].tolist() == [1] * 3
        # The next save clears what the killed one left.
        save(run, 4, 4.0)
        assert steps(run) == ([1, 2, 4] if step == 2 else [1, 3, 4])
        moment += 1
    assert moment > 10


def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch):
    save(tmp_path, 1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert steps(tmp_path) == [1]


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_disk_safetensors(*_: object, **__: object) -> None:
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def _full_disk_torch(*_: object, **__: object) -> None:
    try:
        _full_disk()
    except OSError as error:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos") from error


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("torch.save", _full_disk_torch),
        ("fastft.checkpoint.formats.save_file", _full_disk_safetensors),
        ("os.fsync", _full_disk),
        ("fastft.checkpoint.save.json.dumps", _full_disk),
        ("pathlib.Path.mkdir", _full_disk),
        ("pathlib.Path.replace", _full_disk),
    ],
)
@pytest.mark.parametrize("step", [1, 2])
def test_full_disk(tmp_path: Path, monkeypatch, target: str, failure: Callable, step: int):
    first = save(tmp_path, 1, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(target, failure)
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, step, 2.0)
    (message,) = caught.value.problems
    assert message.startswith(f"{tmp_path}/checkpoints/step-0000000{step}: must be written whole")
    assert "No space left on device" in message
    assert "GiB free" in message
    assert steps(tmp_path) == [1]
    assert load_checkpoint(first).meta["value"] == 1.0


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match="must be written whole; got Not a directory"):
        save(tmp_path / "run", 1)


def test_programming_errors_are_not_blamed_on_the_disk(tmp_path: Path):
    def broken(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("a bug")

    (tmp_path / "x.txt").write_text("before")
    with pytest.raises(RuntimeError, match="a bug"):
        write_file_atomically(tmp_path / "x.txt", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "before"


def test_writing_one_file(tmp_path: Path):
    path = tmp_path / "deep" / "x.pt"
    for value in (1, 2):
        write_file_atomically(path, lambda temporary, value=value: torch.save(value, temporary))
    assert torch.load(path) == 2
    assert list(path.parent.iterdir()) == [path]
    path.with_name(".tmp-x.pt").write_text("left by a killed writer")
    write_file_atomically(path, Path.touch)
    assert list(path.parent.iterdir()) == [path]


def test_writing_over_a_folder(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    (tmp_path / ".tmp-old-folder").mkdir()
    (tmp_path / ".tmp-old-folder" / "left").touch()
    write_file_atomically(tmp_path / "folder", Path.mkdir)
    assert list((tmp_path / "folder").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(CheckpointError, match="must be written whole; got Is a directory"):
        write_file_atomically(tmp_path / "folder", lambda temporary: temporary.touch())


@pytest.mark.parametrize("name", ["rename", "replace"])
def test_an_interrupt_while_a_folder_is_replaced(tmp_path: Path, monkeypatch, name: str):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    rename, left = Path.rename, [KeyboardInterrupt]

    def interrupted(path: Path, target: Path) -> Path:
        # The old folder is aside by then, and the new one not yet in its place.
        if name == "rename":
            rename(path, target)
        if left:
            raise left.pop()
        return target

    monkeypatch.setattr(Path, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file_atomically(folder, Path.mkdir)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in folder.iterdir()] == ["old"]


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "message", "passed_over"),
    [
        ("model.safetensors", Path.unlink, "must be readable; got No such file", True),
        ("model.safetensors", _truncate, "must have", True),
        ("model.safetensors", _flip_a_bit, "must be as it was saved", False),
        ("training.pt", _truncate, "must have", True),
        ("training.pt", _flip_a_bit, "must be as it was saved", False),
        ("meta.json", Path.unlink, "must describe a checkpoint of fastft", True),
        ("meta.json", lambda path: path.write_text("{"), "must describe a checkpoint", True),
        ("meta.json", lambda path: path.write_text("[]"), "must describe a checkpoint", True),
    ],
)
def test_damage(
    tmp_path: Path, caplog, name: str, damage: Callable, message: str, passed_over: bool
):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    damage(second / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(second)
    assert str(second / name) in str(caught.value)
    assert latest_checkpoint(tmp_path) == (first if passed_over else second)
    assert ("passed over" in caplog.text) == passed_over


def test_all_damaged_files_are_named_at_once(tmp_path: Path):
    path = save(tmp_path, 1)
    _truncate(path / "model.safetensors")
    _flip_a_bit(path / "training.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert len(caught.value.problems) == 2
    assert str(caught.value).endswith(f"; remove the folder {path} to start the run anew")


def test_removing_a_damaged_checkpoint_goes_on_from_the_one_before(tmp_path: Path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    _flip_a_bit(second / "training.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(second)
    advice = f"; remove the folder {second} to go on from step-00000001"
    assert str(caught.value).endswith(advice)
    shutil.rmtree(second)
    assert latest_checkpoint(tmp_path) == first


def test_meta_is_json_that_other_tools_read(tmp_path: Path):
    text = (save(tmp_path, 1, math.nan) / "meta.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["value"] is None


def test_tensors_on_the_asked_device(tmp_path: Path):
    found: dict[str, Tensor] = load_checkpoint(save(tmp_path, 1), device=torch.device("cpu")).model
    assert found["a"].device.type == "cpu"
