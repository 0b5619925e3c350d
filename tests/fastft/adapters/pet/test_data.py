"""Structures from files: labels, neighbours, turns, batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import ase.neighborlist
import numpy as np
import pytest
import torch
from ase.db import connect

from fastft.adapters.pet.data import with_neighbours
from fastft.adapters.pet.pairs import padded_width
from fastft.config import DataSource
from fastft.errors import ConfigError, DataError


def opened(adapter: Any, path: Path, **options: Any) -> Any:
    return adapter.dataset(DataSource(path=path, options=options), "train")


@pytest.fixture
def rename(tmp_path: Path, structures: list[ase.Atoms]) -> Callable[..., Path]:
    """The structures in a file with other names for their labels."""

    def make(**names: str) -> Path:
        for atoms in structures:
            results, atoms.calc = dict(atoms.calc.results), None  # type: ignore[union-attr]
            volume = atoms.cell.volume
            results["virial"] = -volume * atoms_stress(results)
            for label, name in names.items():
                place = atoms.arrays if label == "forces" else atoms.info
                place[name] = results[label]
        path = tmp_path / "renamed.xyz"
        ase.io.write(path, structures, format="extxyz")
        return path

    return make


def atoms_stress(results: dict[str, Any]) -> np.ndarray:
    xx, yy, zz, yz, xz, xy = results["stress"]
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def test_labels_have_names(make_adapter: Any, atoms_file: Path, rename: Any) -> None:
    adapter = make_adapter(stress=True)
    plain = opened(adapter, atoms_file, frames="3:10:3")
    path = rename(energy="E_dft", forces="F_dft", virial="W_dft")
    names = {"energy": "E_dft", "forces": "F_dft", "virial": "W_dft"}
    renamed = opened(adapter, path, frames="3:10:3", **names)
    assert len(plain) == len(renamed) == 3
    for one, other in zip(plain.samples, renamed.samples, strict=True):
        assert one.keys() == other.keys()
        for label in names.keys() & one.keys():
            np.testing.assert_allclose(one[label], other[label], atol=1e-6)
    assert "stress" in plain[0]
    np.testing.assert_allclose(plain[0]["stress"], renamed[0]["stress"], atol=1e-6)


def test_databases_are_read_too(
    make_adapter: Any, atoms_file: Path, tmp_path: Path, structures: list[ase.Atoms]
) -> None:
    database = connect(tmp_path / "atoms.db")
    for atoms in structures:
        database.write(atoms)
    adapter = make_adapter()
    text, base = opened(adapter, atoms_file), opened(adapter, tmp_path / "atoms.db")
    assert len(base) == len(structures)
    for one, other in zip(text.samples, base.samples, strict=True):
        np.testing.assert_allclose(one["forces"], other["forces"], atol=1e-6)
        assert one["energy"] == pytest.approx(other["energy"])


@pytest.mark.parametrize("pbc", [(False,) * 3, (True,) * 3, (True, False, True)])
def test_neighbours(pbc: tuple[bool, ...]) -> None:
    random = np.random.default_rng(0)
    cell = np.diag([3.0, 4.0, 5.0]) * np.array(pbc)[:, None]
    positions = random.uniform(0, 3, (5, 3))
    structure = {
        "species": np.ones(5, int),
        "positions": positions,
        "cell": cell,
        "pbc": np.array(pbc),
    }
    found = with_neighbours({"structure": structure}, cutoff=3.5, elements=[1], augment=False)
    pairs = found["neighbours"]
    vectors = positions[pairs["neighbours"]] - positions[pairs["centers"]] + pairs["shifts"] @ cell
    distances = np.linalg.norm(vectors, axis=1)
    atoms = ase.Atoms("H5", positions, cell=cell, pbc=pbc)
    expected = ase.neighborlist.neighbor_list("d", atoms, 3.5)
    np.testing.assert_allclose(np.sort(distances), np.sort(expected))
    assert len(distances) > 0


def test_turns_change_no_error(make_adapter: Any, build: Any, atoms_file: Path) -> None:
    adapter = make_adapter(stress=True, dtype="float64")
    build(adapter)
    data = opened(adapter, atoms_file)
    torch.manual_seed(3)
    turned = adapter.transform(data[9], "train")
    still = adapter.transform(data[9], "validation")
    assert not np.allclose(turned["forces"], still["forces"])
    for label, norm in (("forces", 1), ("stress", (0, 1))):
        np.testing.assert_allclose(
            np.linalg.norm(turned[label], axis=norm), np.linalg.norm(still[label], axis=norm)
        )
    # The work of the forces along the positions is the same in any frame.
    for name, value in (("structure", "positions"),):
        works = [(s["forces"] * s[name][value]).sum() for s in (turned, still)]
        assert works[0] == pytest.approx(works[1])
    strained = [
        s["structure"]["cell"] @ s["stress"] @ s["structure"]["cell"].T for s in (turned, still)
    ]
    np.testing.assert_allclose(*strained)
    assert adapter.transform(data[9], "train")["structure"]["print"] == still["structure"]["print"]


def test_batches_concatenate(make_adapter: Any, build: Any, atoms_file: Path) -> None:
    adapter = make_adapter(stress=True)
    build(adapter)
    data = opened(adapter, atoms_file)
    samples = [adapter.transform(data[i], "validation") for i in (2, 6, 7)]
    batch = adapter.collate(samples)
    assert batch["atoms"].tolist() == [3, 7, 1]
    assert batch["system"].tolist() == [0] * 3 + [1] * 7 + [2]
    assert batch["positions"].dtype == torch.float32
    assert batch["energy"].dtype == batch["forces"].dtype == torch.float64
    assert batch["stress"].isnan().all((1, 2)).tolist() == [True, False, True]
    # Pairs stay within their structure.
    assert torch.equal(batch["system"][batch["centers"]], batch["system"][batch["neighbours"]])
    present, reverse = batch["present"], batch["reverse"].flatten()
    assert present.sum() == sum(len(s["neighbours"]["centers"]) for s in samples)
    # Empty places go from an atom to itself, and every place is named once.
    own = batch["centers"] == batch["neighbours"]
    assert (own & (batch["shifts"] == 0).all(1)).tolist() == (~present).flatten().tolist()
    assert torch.equal(reverse[reverse], torch.arange(present.numel()))


@pytest.mark.parametrize(
    ("neighbours", "width"), [(0, 7), (7, 7), (8, 15), (52, 55), (63, 63), (64, 79), (128, 159)]
)
def test_widths_are_few(neighbours: int, width: int) -> None:
    assert padded_width(neighbours) == width


def test_absent_labels_are_named(make_adapter: Any, rename: Any) -> None:
    path = rename(energy="E_dft", forces="F_dft")
    with pytest.raises(DataError) as error:
        opened(make_adapter(stress=True), path, energy="E_dtf")
    assert error.value.problems == (
        f"{path}: energy: must be in the file as 'E_dtf'; got no structure that has it; did you"
        " mean 'E_dft'?; set options.energy",
        f"{path}: forces: must be in the file as 'forces'; got no structure that has it; choose"
        " from 'F_dft'; set options.forces or options.lacks, or model.options.forces = false",
        f"{path}: stress: must be in the file as 'stress'; got no structure that has it; set"
        " options.stress or options.lacks, or model.options.stress = false",
    )


def test_bad_files(make_adapter: Any, build: Any, atoms_file: Path, tmp_path: Path) -> None:
    adapter = make_adapter(elements=["H", "C"])
    build(adapter)
    with pytest.raises(ConfigError, match="must be a slice, such as ':80'; got 'eight'"):
        opened(adapter, atoms_file, frames="eight")
    (tmp_path / "broken.xyz").write_text("3\nno structure\nH 0 0\n")
    with pytest.raises(DataError, match="must be a file that ASE reads; got"):
        opened(adapter, tmp_path / "broken.xyz")
    data = opened(adapter, atoms_file)
    with pytest.raises(DataError, match="elements must be the model's, H, C; got O; remove"):
        [adapter.transform(data[i], "train") for i in range(len(data))]
    structure = {**data[9]["structure"], "cell": np.zeros((3, 3))}
    with pytest.raises(DataError, match="cell: must have a volume where the structure repeats"):
        adapter.transform({"structure": structure | {"species": np.ones(3, int)}}, "train")
