"""The two file formats of weights, safetensors and torch files, told apart by content."""

import argparse
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastft.errors import CheckpointError

Format = Literal["safetensors", "torch", "torch (legacy)"]

# First pickled object of a torch file older than 1.6: the number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"

# The safetensors library's own limit, in bytes.
_LONGEST_HEADER = 100_000_000

# What people hand over instead of weights, by its first bytes.
_STRANGERS = {
    b"version https://git-lfs": ("a git-lfs pointer", "fetch the file itself: git lfs pull"),
    b"<": ("a web page or XML", "download the file again: the server sent a page instead"),
    b"\x89HDF": ("an HDF5 file", "convert it to safetensors"),
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
}

# Plain data that trainers keep beside the weights, and that runs no code when it is unpickled.
# numpy 1 pickled the same functions under another module name.
_array, _scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
_PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    # Python 3.13 pickles it under this name.
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdFDSU"},
    *[
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((_array, "_reconstruct"), (_scalar, "scalar"))
    ],
]


def sniff(path: Path) -> Format:
    """The format by content, whatever the suffix.

    Raises:
        CheckpointError: missing, empty, unreadable or of no known format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: must be a readable file; got {error.strerror}") from error
    if not size:
        raise CheckpointError(f"{path}: must hold weights; got an empty file; fetch it again")
    # The header's length in 8 bytes, then the header in JSON. First: the length may begin with the
    # bytes of any other format.
    plausible = int.from_bytes(head[:8], "little") <= _LONGEST_HEADER and head[8:9] == b"{"
    if plausible or (path.suffix == ".safetensors" and size < 9):
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return "torch"
    if head.startswith(b"\x80"):
        if _LEGACY_MAGIC in head:
            return "torch (legacy)"
        raise _holds_code(path, "a Python pickle that torch.save did not write")
    for magic, (what, advice) in _STRANGERS.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path}: must be a checkpoint; got {what}; {advice}")
    raise CheckpointError(
        f"{path}: must be a safetensors file or one written by torch.save; got neither (it begins"
        f" with {head[:16]!r}); give the file that holds the weights"
    )


def read_safetensors(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors by name, with those that `write_safetensors` folded restored.

    Returns:
        (tensors, the file's metadata)
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, "safetensors", error) from error
    for name in json.loads(metadata.get("fastft.complex128", "[]")):
        tensors[name] = torch.view_as_complex(tensors[name])
    for name, same in json.loads(metadata.get("fastft.tied", "{}")).items():
        tensors[name] = tensors[same]
    return tensors, metadata


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by name. Tied ones are written once, under their first name.

    The format allows no two names for one memory and no complex128; its metadata tells
    `read_safetensors` how to undo both.
    """
    written: dict[str, Tensor] = {}
    names: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    doubles: list[str] = []
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = names.setdefault(place, name) if tensor.numel() else name
        if first != name:
            tied[name] = first
            continue
        value = tensor.detach()
        if value.dtype == torch.complex128:
            doubles.append(name)
            value = torch.view_as_real(value.resolve_conj())
        value = value.to("cpu").contiguous()
        whole = value.untyped_storage().nbytes() == value.nbytes
        # A view of a larger storage would count as shared with its other views.
        written[name] = value if whole else value.clone()
    metadata = {"format": "pt"}
    if tied:
        metadata["fastft.tied"] = json.dumps(tied)
    if doubles:
        metadata["fastft.complex128"] = json.dumps(doubles)
    save_file(written, path, metadata)


def read_torch(path: Path, *, mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU. Code in the file is never run.

    Args:
        mmap: leave tensors on disk until they are used, where the file's version can.
    """
    mmap = mmap and sniff(path) == "torch"
    try:
        with torch.serialization.safe_globals(_PLAIN_DATA):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise _holds_code(path, f"'{found[1]}'") from error
        raise _damaged(path, "torch", error) from error
    except MemoryError:
        raise
    # A damaged pickle can raise anything: KeyError, EOFError, UnicodeDecodeError, RuntimeError.
    except Exception as error:
        raise _damaged(path, "torch", error) from error


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _damaged(path, "torch", error) from error
    if "data.pkl" not in members:
        raise CheckpointError(
            f"{path}: must be a checkpoint; got a zip archive that torch.save did not write; give"
            " the file that holds the weights"
        )
    if "constants.pkl" in members:
        raise _holds_code(path, "a TorchScript archive")


def _holds_code(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: must hold tensors and plain data only; got {what}, that is code, which was not"
        " run; re-save its state_dict as safetensors with the tool that made it, or have an adapter"
        " that knows it read it (fastft show --run RUN.toml)"
    )


def _damaged(path: Path, kind: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return CheckpointError(
        f"{path}: must be a whole {kind} file; got a truncated or damaged one"
        f" ({path.stat().st_size:,} bytes: {reason}); fetch or save it again"
    )
