"""Writing a file or a folder so that it is there whole or not at all."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fastft.errors import CheckpointError

# Not on network and FUSE file systems, where a folder cannot be synced; the rename stays atomic.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)


def write_file_atomically(path: Path, writer: Callable[[Path], object]) -> None:
    """Writes `path` through `writer(temporary path)`: an earlier file stays until the new is whole.

    Raises:
        CheckpointError: it cannot be written; nothing is left behind.
    """
    with written_whole(path) as temporary:
        writer(temporary)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yields a sibling of `target` to write to, a file or a folder, which then takes its place.

    Raises:
        CheckpointError: it cannot be written. As with any exception, `target` is as before.
    """
    # The name comes last: some writers go by the suffix.
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        with writing_explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            yield temporary
            _open_to_others(temporary)
            _sync(temporary)
            _put_in_place(temporary, target)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


@contextmanager
def writing_explained(target: Path) -> Iterator[None]:
    """Turns failures of the disk into one CheckpointError; other exceptions pass."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _disk_failure(error)
        if reason is None:
            raise
        raise CheckpointError(
            f"{target}: must be written whole; got {reason}{_free_space(target)}; free space or"
            " choose a folder that can be written; what was saved before is untouched"
        ) from error


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(folder: Path) -> None:
    """Removes a folder so that a kill leaves no half of it under its name."""
    remove(folder.rename(folder.with_name(f".tmp-old-{folder.name}")))


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left in `folder`."""
    for leftover in folder.glob(".tmp-*"):
        remove(leftover)


def _put_in_place(temporary: Path, target: Path) -> None:
    aside = target.with_name(f".tmp-old-{target.name}")
    # A rename replaces a file, but no folder that holds something.
    replaces_folder = target.is_dir() and temporary.is_dir()
    try:
        if replaces_folder:
            remove(aside)
            target.rename(aside)
        temporary.replace(target)
    except BaseException:
        if replaces_folder and not target.exists():
            aside.rename(target)
        raise
    _sync_one(target.parent)
    remove(aside)


def _open_to_others(path: Path) -> None:
    """Gives the permissions of the user's umask: safetensors lets only the owner read."""
    umask = os.umask(0)
    os.umask(umask)
    for file in (path, *path.rglob("*")):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


def _sync(path: Path) -> None:
    for inside in path.iterdir() if path.is_dir() else ():
        _sync(inside)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)


def _disk_failure(error: BaseException | None) -> str | None:
    """What the system said, wherever in the chain; None: the disk is not to blame."""
    reason = None
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        # safetensors has one exception for everything, without an errno.
        if isinstance(error, SafetensorError) and "I/O error" in str(error):
            return re.sub(r".*I/O error: ", "", str(error))
        # Nor has torch.save, when it was given a path.
        if "inline_container" in str(error):
            reason = "a failed write (is the disk full?)"
        error = error.__cause__ or error.__context__
    return reason


def _free_space(target: Path) -> str:
    for folder in target.parents:
        with suppress(OSError):
            return f" ({shutil.disk_usage(folder).free / 2**30:.1f} GiB free)"
    return ""
