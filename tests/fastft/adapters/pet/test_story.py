"""The story of two levels of theory: its data, its runs scaled down, its table."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential

ROOT = Path(__file__).parents[4]
STORY = ROOT / "examples" / "pet" / "g2"
RECORDS = [
    ROOT / "benchmarks" / "results" / f"2026-11-26-cpu-pet-g2{name}.jsonl"
    for name in ("", "-not-rescaled")
]
DATA = Path("runs/g2/data")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """One of the story's scripts, as a module; with less data."""

    def module(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"g2_{name}", STORY / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        if name == "label":
            for size, value in (("OLD", 1), ("HELD_OUT", 1), ("NEW", 8)):
                monkeypatch.setattr(made, size, value)
        return made

    return module


def read(name: str) -> list[ase.Atoms]:
    frames = ase.io.read(DATA / f"{name}.xyz", ":")
    assert isinstance(frames, list)
    return frames


def test_molecules_are_held_out(project: Path, load: Any) -> None:
    load("label").write_data(DATA, EMT(), MorsePotential())
    names = {name: {atoms.info["name"] for atoms in read(name)} for name in ("old", "new")}
    held_out, unseen = ({a.info["name"] for a in read(name)} for name in ("held-out", "unseen"))
    assert len(held_out) == len(unseen) == 9
    assert len(names["old"] | unseen) == 58
    assert held_out <= names["old"] - names["new"]
    assert not unseen & (names["old"] | names["new"])
    for old, new in zip(read("held-out-old"), read("held-out"), strict=True):
        np.testing.assert_array_equal(old.positions, new.positions)
        assert old.get_potential_energy() != new.get_potential_energy()


def test_the_story_scaled_down(project: Path, load: Any, monkeypatch: Any, capsys: Any) -> None:
    """With potentials that cost nothing for the two levels of theory."""
    load("label").write_data(DATA, EMT(), MorsePotential())
    story, report = load("story"), load("report")
    monkeypatch.setattr(story, "DRAWS", (1,))
    # As a rerun finds it.
    story.run("pretrain", "pretrain.toml", "run.steps=1", "optim.schedule.warmup_steps=0")
    Path("runs/g2/pretrained.ckpt").touch()
    story.tell((4,), ("run.steps=2", "optim.schedule.warmup_steps=0", "log.every_steps=1"))
    monkeypatch.setattr(report.sys, "argv", ["report.py"])
    capsys.readouterr()
    report.main()
    printed = capsys.readouterr().out
    record = json.loads(Path("runs/g2/record.jsonl").read_text())
    rows = {row["way"]: row for row in record["rows"]}
    assert list(rows) == ["pretrain", *story.WAYS]
    for way in story.WAYS:
        assert (rows[way]["structures"], rows[way]["draw"]) == (4, 1)
        trained = "forces[energy/gfn2]_rmse_mev_per_angstrom"
        assert rows[way]["held out"][trained] > 0
        assert rows[way]["unseen"][trained] > 0
        # Only there is the old target trained and scored.
        old = "forces_rmse_mev_per_angstrom" in rows[way]["held out"]
        assert old == (way == "multi-fidelity")
        assert printed.count(f"| {way} |") + printed.count(f"| `{way}` |") == 2
    assert "frozen" in Path("runs/g2/heads-4-1.log").read_text()
    assert Path("runs/g2/learning-curves.png").stat().st_size > 10_000


def test_two_levels_of_theory(project: Path, load: Any) -> None:
    """Real ones: close, with other energies of the atoms."""
    pytest.importorskip("tblite", reason="needs two levels of theory: tblite is not installed")
    load("label").main(DATA)
    old, new = (read(name) for name in ("held-out-old", "held-out"))
    forces = [np.concatenate([atoms.get_forces() for atoms in each]) for each in (old, new)]
    difference = np.sqrt(np.mean((forces[0] - forces[1]) ** 2))
    assert 0.05 < difference < 0.2 * np.sqrt(np.mean(forces[1] ** 2))
    for one, other in zip(old, new, strict=True):
        assert abs(one.get_potential_energy() - other.get_potential_energy()) > 1


def test_run_files_are_short() -> None:
    files = sorted(STORY.glob("*.toml"))
    assert len(files) == 4
    assert all(len(file.read_text().splitlines()) <= 40 for file in files)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_table_is_the_record(load: Any, path: Path) -> None:
    record = json.loads(path.read_text())
    assert load("report").table(record) in (STORY / "README.md").read_text()
