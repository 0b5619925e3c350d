import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastft.config import DataSource
from fastft.data.sources import ArrayData, open_source, open_sources
from fastft.errors import ConfigError, DataError


def write_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 2) -> None:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for image in range(each):
            pixels = np.full((4, 6, 3), 10 * number + image, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{image}.png")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_the_arrays(tmp_path: Path, adapter_of, save: Callable):
    x, fortran = np.random.default_rng(0).normal(size=(2, 5, 3, 4))
    fortran = np.asfortranarray(fortran)
    names = np.array(list("abcde"))
    save(tmp_path / "a.npz", x=x, fortran=fortran, y=np.arange(5), names=names)
    source = open_source(adapter_of(), DataSource(path=tmp_path / "a.npz"), "train")
    assert len(source) == 5
    for index in range(5):
        sample = source[index]
        assert np.array_equal(sample["x"], x[index])
        assert np.array_equal(sample["fortran"], fortran[index])
        assert sample["y"] == index
        assert sample["names"] == names[index]


def test_a_stored_npz_is_mapped_and_samples_are_free_to_change(tmp_path: Path, adapter_of):
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 3)))
    source = open_source(adapter_of(), DataSource(path=tmp_path / "a.npz"), "train")
    assert isinstance(source.raw, ArrayData)
    assert isinstance(source.raw.arrays["x"], np.memmap)
    source[0]["x"][:] = 1
    assert not source[0]["x"].any()


def test_fields_rename_arrays_and_the_others_keep_their_names(tmp_path: Path, adapter_of):
    np.savez(tmp_path / "a.npz", x=np.arange(3.0), targets=np.arange(3))
    opened = DataSource(path=tmp_path / "a.npz", fields={"inputs": "x"})
    assert open_source(adapter_of(), opened, "train")[2] == {"inputs": 2.0, "targets": 2}


def test_items_go_through_the_transform(tmp_path: Path, adapter_of):
    np.savez(tmp_path / "a.npz", x=np.arange(3.0))
    adapter = adapter_of(change=lambda sample: {"doubled": 2 * sample["x"]})
    assert open_source(adapter, DataSource(path=tmp_path / "a.npz"), "train")[2] == {"doubled": 4}


def test_images_are_found_by_class_folder(tmp_path: Path, adapter_of):
    write_images(tmp_path)
    (tmp_path / ".cache").mkdir()
    Image.new("L", (6, 4), 77).save(tmp_path / "dog" / "grey.JPG")
    source = open_source(adapter_of(), DataSource(path=tmp_path), "train")
    assert source.classes == ["cat", "dog"]
    assert [source[i]["targets"] for i in range(len(source))] == [0, 0, 1, 1, 1]
    assert source[3]["inputs"].shape == (4, 6, 3)
    assert source[3]["inputs"].dtype == np.uint8
    assert (source[3]["inputs"] == 11).all()
    assert (source[4]["inputs"] == 77).all()


def test_other_paths_go_to_the_adapter(tmp_path: Path, adapter_of):
    adapter = adapter_of(open=lambda source: [{"path": source.path}])
    assert open_source(adapter, DataSource(path=tmp_path), "test")[0] == {"path": tmp_path}


def broken_zip(path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(1000))
    path.write_bytes(buffer.getvalue()[:-200])


def damaged_member(path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.random.default_rng(0).normal(size=1000))
    content = bytearray(buffer.getvalue())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)


def not_arrays(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")


@pytest.mark.parametrize(
    ("write", "fields", "message"),
    [
        (lambda path: None, {}, "must exist; got no such file or folder; correct `path`"),
        (broken_zip, {}, "must be a whole .npz file; got BadZipFile"),
        (damaged_member, {}, "must be a whole .npz file; got"),
        (not_arrays, {}, "must hold arrays; got none"),
        (lambda path: path.mkdir(), {}, "must be a whole .npz file; got IsADirectoryError"),
        (
            lambda path: np.savez(path, x=np.array([{}, 1], object)),
            {},
            r"x: arrays must hold numbers, or one text per sample; got object \[2\]; store",
        ),
        (
            lambda path: np.savez(path, x=np.zeros(2), time=np.zeros(2, "datetime64[s]")),
            {"when": "time"},
            r"time: .* got datetime64\[s\] \[2\]; store .* seconds for times",
        ),
        (lambda path: np.savez(path, x=np.array([["a"], ["b"]])), {}, r"x: .* got <U1 \[2, 1\]"),
        (
            lambda path: np.savez_compressed(path, x=np.zeros(2, [("a", float)])),
            {},
            r"x: .* got \[\('a', '<f8'\)\] \[2\]",
        ),
        (lambda path: np.savez(path, x=np.zeros((0, 3))), {}, "must hold samples; got none"),
        (
            lambda path: np.savez(path, x=np.zeros((3, 2)), y=np.zeros(4)),
            {},
            r"equally long .* got x \(3, 2\), y \(4,\);",
        ),
        (lambda path: np.savez(path, x=np.zeros(3), c=np.float64(1)), {}, r"got .*c \(\);"),
        (
            lambda path: np.savez(path, inputs=np.zeros(3)),
            {"x": "input"},
            "fields: arrays must be in the file; got 'input'; did you mean 'inputs'?",
        ),
    ],
)
def test_npz_errors(tmp_path: Path, adapter_of, write: Callable, fields: dict, message: str):
    path = tmp_path / "a.npz"
    write(path)
    with pytest.raises(DataError, match=message) as error:
        open_source(adapter_of(), DataSource(path=path, name="mine", fields=fields), "train")
    assert str(error.value).startswith(f"mine ({path}): ")


def truncate_image(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_image, "must be a whole image; got OSError: image file is truncated"),
        (lambda p: p.write_bytes(b"no image"), "must be a whole image; got UnidentifiedImageError"),
        (
            lambda p: Image.fromarray(np.zeros((4, 4), np.uint16)).save(p),
            "must have 8 bits per channel; got mode 'I;16'; store it as an array",
        ),
    ],
)
def test_image_errors_name_file_and_index(
    tmp_path: Path, adapter_of, damage: Callable, message: str
):
    write_images(tmp_path)
    file = tmp_path / "dog" / "1.png"
    damage(file)
    source = open_source(adapter_of(), DataSource(path=tmp_path, name="pets"), "train")
    with pytest.raises(DataError, match=message) as error:
        source[3]
    assert str(error.value).startswith(f"pets: sample 3: {file}: ")


@pytest.mark.parametrize("folders", [(), ("cat", "dog")])
def test_a_folder_without_images(tmp_path: Path, adapter_of, folders: tuple[str, ...]):
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(DataError, match=f"one folder of images per class; got {len(folders)}"):
        open_source(adapter_of(), DataSource(path=tmp_path, format="images"), "train")


def test_read_errors_of_an_adapter_are_data_errors(tmp_path: Path, adapter_of):
    def fail(_: object):
        raise OSError("no NetCDF")

    with pytest.raises(DataError, match="by the adapter; got OSError: no NetCDF"):
        open_source(adapter_of(open=fail), DataSource(path=tmp_path), "train")
    adapter = adapter_of(open=lambda source: [{"x": 1}], change=fail)
    with pytest.raises(DataError, match="mine: sample 0: must be readable; got OSError: no NetCDF"):
        open_source(adapter, DataSource(path=tmp_path, name="mine"), "train")[0]


def test_a_bug_stays_what_it_is_and_names_the_sample(tmp_path: Path, adapter_of):
    adapter = adapter_of(open=lambda source: [{"x": 1}], change=lambda sample: sample["y"])
    with pytest.raises(KeyError) as error:
        open_source(adapter, DataSource(path=tmp_path, name="mine"), "train")[0]
    assert error.value.__notes__ == ["while reading mine: sample 0"]


def test_several_sources_report_together(tmp_path: Path, adapter_of):
    sources = [DataSource(path=tmp_path / name) for name in ("a.npz", "b.npz")]
    with pytest.raises(DataError) as error:
        open_sources(adapter_of(), sources, "train")
    assert len(error.value.problems) == 2


def test_names_must_differ(adapter_of, write_npz: Callable):
    source = write_npz(x=np.zeros(3))
    with pytest.raises(ConfigError, match="names of data sets must differ; got data twice"):
        open_sources(adapter_of(), [source, source], "train")
