"""Reading weights: where they are found, and what is said of files that hold none."""

import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastft.checkpoint import read_weights, save_checkpoint
from fastft.checkpoint.formats import write_safetensors
from fastft.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[n], STATE[n]) for n in STATE)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_safetensors_whatever_the_suffix(tmp_path: Path, suffix: str):
    path = tmp_path / f"weights{suffix}"
    save_file(STATE, path)
    weights = read_weights(path)
    assert (weights.format, weights.key) == ("safetensors", "")
    assert same(weights.tensors)


def test_safetensors_whatever_the_header_begins_with(tmp_path: Path):
    # The header's length comes first: its low byte may be that of a pickle, a zip or a page.
    path, seen = tmp_path / "x", set()
    for length in range(1, 260, 8):
        save_file({"a" * length: torch.ones(1)}, path)
        seen.add(path.read_bytes()[0])
        assert read_weights(path).format == "safetensors"
    assert 0x80 in seen


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_torch_files_old_and_new(tmp_path: Path, suffix: str, zipped: bool):
    path = tmp_path / f"weights{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    weights = read_weights(path)
    assert weights.format == ("torch" if zipped else "torch (legacy)")
    assert same(weights.tensors)


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(100)}}, "slots": {"m": torch.ones(100)}}


@pytest.mark.parametrize(
    ("content", "key", "others"),
    [
        ({"epoch": 3, "state_dict": STATE, "optimizer": OPTIMIZER}, "state_dict", ()),
        ({"model": {"state_dict": STATE, "name": "x"}}, "model.state_dict", ()),
        ({"model_state_dict": STATE, "ema": STATE}, "model_state_dict", ("ema",)),
        ({"step": torch.tensor(3), "module": STATE}, "module", ("",)),
        ({"odd": STATE, "few": {"x": torch.ones(1)}}, "odd", ("few",)),
        ({"ema": STATE, "optimizer_states": [OPTIMIZER]}, "ema", ()),
        ({**STATE, "epoch": 3, "config": {"depth": 2}}, "", ()),
    ],
)
def test_finds_the_state_dict(tmp_path: Path, content: dict, key: str, others: tuple[str, ...]):
    torch.save(content, tmp_path / "x.ckpt")
    weights = read_weights(tmp_path / "x.ckpt")
    assert (weights.key, weights.others) == (key, others)
    assert same(weights.tensors)


def test_values_that_are_no_tensors_are_named(tmp_path: Path):
    torch.save({"model": {**STATE, "_extra_state": {"x": 1}}}, tmp_path / "x.pt")
    weights = read_weights(tmp_path / "x.pt")
    assert weights.skipped == ("_extra_state",)
    assert same(weights.tensors)


def test_plain_settings_beside_the_weights_are_no_code(tmp_path: Path):
    args = argparse.Namespace(lr=np.float64(0.1), folder=Path("x"), mean=np.ones(3, np.float32))
    torch.save({"model": STATE, "args": args}, tmp_path / "mae.pth")
    assert same(read_weights(tmp_path / "mae.pth").tensors)


def test_tied_and_complex_tensors_survive_safetensors(tmp_path: Path):
    base = torch.randn(4, 3)
    tensors = {
        "embed": base,
        "head": base,
        "row": base[1],
        "transposed": base.T,
        "spectrum": torch.randn(3, dtype=torch.complex128),
        "empty": torch.empty(0, 3),
        "also_empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    found = read_weights(tmp_path / "x.safetensors").tensors
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert found["embed"] is found["head"]


def test_fastft_folders(tmp_path: Path):
    zeros = {name: torch.zeros_like(t) for name, t in STATE.items()}
    first = save_checkpoint(tmp_path, 1, STATE, {}, {"metrics": {"loss": 1.0}})
    save_checkpoint(tmp_path, 2, zeros, {}, {"metrics": {"loss": 2.0}})
    # The run's best, not its latest.
    weights = read_weights(tmp_path)
    assert weights.path.parent == first
    assert same(weights.tensors)
    averaged = save_checkpoint(tmp_path, 3, zeros, {}, {}, ema_state=STATE)
    weights = read_weights(averaged)
    assert weights.path.name == "ema.safetensors"
    assert same(weights.tensors)
    (averaged / "ema.safetensors").write_bytes(first.joinpath("model.safetensors").read_bytes()[1:])
    with pytest.raises(CheckpointError, match="without a whole checkpoint of fastft"):
        read_weights(averaged)


def _cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _safetensors(path: Path, share: float) -> None:
    save_file({"a": torch.ones(1000)}, path)
    _cut(path, share)


def _torch(path: Path, share: float, zipped: bool = True) -> None:
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    _cut(path, share)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "hello")


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def _damaged_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}q\x00(X\xff\xff")
        archive.writestr("x/version", b"3\n")


def _code(path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Malicious(path.with_name("ran"))}, path)


def _pickled_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Malicious(path.with_name("ran"))}))


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "model.bin").touch()


BAD_FILES = {
    "missing": (lambda path: None, "no such file; check the path"),
    "folder": (_folder, "without a whole checkpoint of fastft; name one of its files: model.bin"),
    "empty folder": (Path.mkdir, "without a whole checkpoint of fastft; give a file"),
    "empty": (Path.touch, "got an empty file"),
    "text": (lambda path: path.write_text("hello, world, how are you"), "got neither"),
    "json": (lambda path: path.write_text(json.dumps({"a": [1, 2, 3]})), "got neither"),
    "zip": (_zip, "zip archive that torch.save did not write"),
    "git-lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>404"), "got a web page"),
    "safetensors without its end": (lambda path: _safetensors(path, 0.9), "truncated or damaged"),
    "half a safetensors header": (lambda path: _safetensors(path, 0.01), "truncated or damaged"),
    "half a torch file": (lambda path: _torch(path, 0.5), "truncated or damaged"),
    "torch without its end": (lambda path: _torch(path, 0.99), "truncated or damaged"),
    "half a legacy file": (lambda path: _torch(path, 0.5, zipped=False), "truncated or damaged"),
    "damaged pickle": (_damaged_pickle, "truncated or damaged"),
    "code": (_code, "'posix.mkdir', that is code, which was not run; re-save its state_dict"),
    "pickle": (_pickled_code, "a Python pickle that torch.save did not write"),
    "whole module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "Linear', that is code"),
    "TorchScript": (_script, "a TorchScript archive, that is code"),
    "no tensors": (lambda path: torch.save({"epoch": 3, "m": {}}, path), "got keys 'epoch', 'm'"),
    "a list": (lambda path: torch.save([1, 2], path), "got list without one"),
    "no tensors at all": (lambda path: save_file({}, path), "must hold tensors; got none"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str):
    make, message = BAD_FILES[name]
    path = tmp_path / "x.safetensors" if "safetensors" in name else tmp_path / "x.pt"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: must ")
    assert not (tmp_path / "ran").exists()


def test_a_file_below_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "file" / "x.pt")
