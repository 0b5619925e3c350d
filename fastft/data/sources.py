"""Opens data sets: `.npz` files, folders of images, and whatever an adapter reads.

Loader workers are forked, so nothing here keeps an open file: arrays are in memory or mapped,
images are opened at each read. An adapter's data set that opens files must do so per process
(at its first read, keyed by `os.getpid()`).
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from fastft.config import DataSource
from fastft.errors import ConfigError, DataError, nearest
from fastft.task import Adapter, Dataset, Sample, Split

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp"})
# Modes whose conversion to RGB would cut values off: 16-bit and 32-bit images.
DEEP_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
READ_ERRORS = (OSError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class OpenSource:
    """A data set whose samples go through the adapter's transform.

    Attributes:
        name: for logs and messages.
        split: passed to the transform.
        raw: the data set before the transform.
        adapter: the transform's owner.
        weight: share of the samples when data sets are mixed.
    """

    name: str
    split: Split
    raw: Dataset
    adapter: Adapter
    weight: float = 1.0

    @property
    def classes(self) -> Sequence[str]:
        """Class names in index order; empty where the data set has none."""
        return getattr(self.raw, "classes", ())

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int, /) -> Sample:
        return self.transform(index, self.read(index))

    def read(self, index: int) -> Sample:
        """The sample before the transform.

        Raises:
            DataError: the sample cannot be read; names data set and index.
        """
        with self._named(index):
            return self.raw[index]

    def transform(self, index: int, sample: Sample) -> Sample:
        """The transform of a sample that `read(index)` gave; it may change the sample in place."""
        with self._named(index):
            return self.adapter.transform(sample, self.split)

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        where = f"{self.name}: sample {index}"
        try:
            yield
        except DataError as error:
            raise DataError(f"{where}: {problem}" for problem in error.problems) from error
        except READ_ERRORS as error:
            message = unreadable(where, "be readable", error, "repair or remove it")
            raise DataError(message) from error
        except Exception as error:
            error.add_note(f"while reading {where}")
            raise


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Samples along the first axis of arrays that are equally long."""

    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int, /) -> Sample:
        # Copies: the arrays may be mapped read-only, and transforms may work in place.
        return {name: _copy(array[index]) for name, array in self.arrays.items()}


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images sorted into one folder per class.

    Attributes:
        files: image and class index.
        classes: folder names, sorted; the position is the class index.
    """

    files: Sequence[tuple[Path, int]]
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Sample:
        path, target = self.files[index]
        return {"inputs": _read_image(path), "targets": target}


def open_source(adapter: Adapter, source: DataSource, split: Split) -> OpenSource:
    """Opens one data set.

    Raises:
        DataError: it is missing, empty, unreadable or inconsistent.
    """
    name = source.name or str(source.path)
    where = f"{source.name} ({source.path})" if source.name else name
    if not source.path.exists():
        raise DataError(
            f"{where}: must exist; got no such file or folder;"
            f" correct `path` (relative paths start at {Path.cwd()})"
        )
    match _format(source):
        case "npz":
            raw = _open_npz(where, source)
        case "images":
            raw = _open_images(where, source.path)
        case _:
            raw = _open_with_adapter(where, adapter, source, split)
    if len(raw) == 0:
        raise DataError(
            f"{where}: must hold samples; got none; check `path` and how it was written"
        )
    return OpenSource(name, split, raw, adapter, source.weight)


def open_sources(
    adapter: Adapter, sources: Iterable[DataSource], split: Split
) -> tuple[OpenSource, ...]:
    """Opens several data sets, whose names must differ.

    Raises:
        DataError: lists the problems of all.
        ConfigError: two data sets share a name.
    """
    opened: list[OpenSource] = []
    problems: list[str] = []
    for source in sources:
        try:
            opened.append(open_source(adapter, source, split))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    names = [source.name for source in opened]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"data.{split}: names of data sets must differ; got {', '.join(repeated)} twice;"
            " set `name`"
        )
    return tuple(opened)


def unreadable(where: str, must: str, error: BaseException, advice: str) -> str:
    """The message for a file that an exception kept from being read."""
    return f"{where}: must {must}; got {type(error).__name__}: {error}; {advice}"


def _format(source: DataSource) -> str:
    if source.format != "auto":
        return source.format
    if source.path.suffix == ".npz":
        return "npz"
    return (
        "images" if any(any(_images_in(folder)) for folder in _folders(source.path)) else "adapter"
    )


def _open_with_adapter(where: str, adapter: Adapter, source: DataSource, split: Split) -> Dataset:
    try:
        return adapter.dataset(source, split)
    except READ_ERRORS as error:
        message = unreadable(where, "be readable by the adapter", error, "repair or replace it")
        raise DataError(message) from error


def _open_npz(where: str, source: DataSource) -> ArrayData:
    try:
        with zipfile.ZipFile(source.path) as archive:
            stored = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
            taken = set(source.fields.values())
            # Arrays that `fields` does not mention keep their own names.
            fields = {n: n for n in stored if n not in taken} | source.fields
            if unknown := [name for name in source.fields.values() if name not in stored]:
                raise DataError(
                    f"{where}: fields: arrays must be in the file; got '{name}'"
                    f"{nearest(name, sorted(stored))}"
                    for name in unknown
                )
            if unfit := list(_unfit_arrays(archive, fields.values())):
                raise DataError(
                    f"{where}: {name}: arrays must hold numbers, or one text per sample; got {got};"
                    " store them as numbers, such as class indices, or seconds for times"
                    for name, got in unfit
                )
            arrays = {
                field: _read_array(source.path, archive, name) for field, name in fields.items()
            }
    except (*READ_ERRORS, ValueError) as error:
        advice = "write it again with numpy.savez"
        raise DataError(unreadable(where, "be a whole .npz file", error, advice)) from error
    if not arrays:
        raise DataError(f"{where}: must hold arrays; got none; write it with numpy.savez")
    lengths = {array.shape[:1] for array in arrays.values()}
    if len(lengths) > 1 or () in lengths:
        shapes = ", ".join(f"{field} {array.shape}" for field, array in arrays.items())
        raise DataError(
            f"{where}: arrays must be equally long along their first axis, one entry per sample;"
            f" got {shapes}; correct or remove the odd ones"
        )
    return ArrayData(arrays)


def _unfit_arrays(archive: zipfile.ZipFile, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Arrays that torch's collate cannot stack: their names, and what they hold."""
    for name in names:
        with archive.open(f"{name}.npy") as member:
            shape, _, dtype = _read_header(member)
        is_text = dtype.kind in "SU" and len(shape) < 2
        if dtype.kind not in "biufc" and not is_text:
            yield name, f"{dtype} {list(shape)}"


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of a member that is left at its data."""
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    # Version 3 has UTF-8 in the names of a structured dtype's fields, which is refused anyway.
    return np.lib.format.read_array_header_2_0(member)


def _read_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an `.npz` file: mapped where `numpy.savez` stored it as it is, else in memory.

    Raises:
        ValueError: a broken header.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type == zipfile.ZIP_STORED:
        with archive.open(info) as member:
            shape, fortran, dtype = _read_header(member)
            start = _member_start(path, info) + member.tell()
        if np.prod(shape):
            order = "F" if fortran else "C"
            return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order=order)
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _member_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes start: behind its local header (APPNOTE.TXT 4.3.7), whose length may
    differ from the central directory's."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    return (
        info.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )


def _open_images(where: str, path: Path) -> ImageFolder:
    folders = _folders(path)
    files = [(file, index) for index, f in enumerate(folders) for file in sorted(_images_in(f))]
    if not files:
        raise DataError(
            f"{where}: must hold one folder of images per class; got {len(folders)} folders, none"
            f" with files in {', '.join(sorted(IMAGE_SUFFIXES))}; check `path`"
        )
    return ImageFolder(files, [folder.name for folder in folders])


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    # Names with a dot hold other things, such as .ipynb_checkpoints.
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_in(folder: Path) -> Iterator[Path]:
    return (
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _read_image(path: Path) -> np.ndarray:
    """RGB values, uint8 `[H, W, 3]`.

    Raises:
        DataError: the file is damaged, or deeper than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in DEEP_MODES:
                return np.array(image.convert("RGB"))
            mode = image.mode
    # Pillow raises SyntaxError and ValueError for some damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = unreadable(str(path), "be a whole image", error, "repair or remove it")
        raise DataError(message) from error
    raise DataError(
        f"{path}: must have 8 bits per channel; got mode '{mode}';"
        " store it as an array in an .npz file"
    )


def _copy(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.ndarray) else value
