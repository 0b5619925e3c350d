"""Open weather files: never two handles of one file in a process.

netCDF 4.10 with HDF5 2.2 may fail to open a file ('NetCDF: HDF error') of which one of two handles
was closed, once another file was opened after that.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import xarray as xr

_Key = tuple[int, str, int, int]
_live: "weakref.WeakValueDictionary[_Key, xr.Dataset]" = weakref.WeakValueDictionary()


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr store, of format 2 or 3."""
    marks = (".zgroup", ".zmetadata", "zarr.json")
    return path.is_dir() and any((path / mark).exists() for mark in marks)


def open_file(path: Path) -> xr.Dataset:
    """Opens lazily, or gives the handle that this process has; never to be closed.

    The file is closed when nobody holds the handle any more.
    """
    key = _key(path)
    handle = _live.get(key)
    if handle is None:
        handle = _live[key] = _open(path)
    return handle


@contextlib.contextmanager
def looked_into(path: Path) -> Iterator[xr.Dataset]:
    """The handle that this process has, or one that is closed again."""
    handle = _live.get(_key(path))
    if handle is not None:
        yield handle
        return
    with _open(path) as handle:
        yield handle


def _key(path: Path) -> _Key:
    # A handle that a forked worker shares with its parent reads garbage, and a file that was
    # replaced is another one.
    found = path.stat()
    return os.getpid(), str(path.resolve()), found.st_ino, found.st_mtime_ns


def _open(path: Path) -> xr.Dataset:
    # Local Zarr stores need no consolidated metadata.
    how = {"engine": "zarr", "consolidated": False} if is_zarr(path) else {"engine": "netcdf4"}
    return xr.open_dataset(path, cache=False, decode_timedelta=False, **how)  # type: ignore[arg-type]
