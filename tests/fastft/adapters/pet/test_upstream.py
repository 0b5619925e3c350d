"""From `mtt train` through fastft back to metatrain, with every way of fine-tuning."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase
import ase.io
import metatrain.cli.eval
import numpy as np
import pytest
import tomli_w
from ase.calculators.morse import MorsePotential
from ase.md.verlet import VelocityVerlet
from metatomic.torch import load_atomistic_model
from metatomic_ase import MetatomicCalculator
from metatrain.cli.eval import eval_model
from metatrain.cli.export import export_model
from metatrain.cli.train import train_model
from metatrain.utils.external_naming import to_external_name
from omegaconf import OmegaConf
from small_pet import TINY, make_structure

from fastft.runfile import read_run_file

NEW = "energy/new"
NAMES = {"energy": "energy_new", "forces": "forces_new"}


def label(atoms: ase.Atoms) -> ase.Atoms:
    """With energies and forces of another potential, too."""
    other = atoms.copy()
    other.calc = MorsePotential(r0=1.3, epsilon=1.5, rho0=3.0, rcut1=2.4, rcut2=2.9)
    atoms.info["energy_new"] = other.get_potential_energy() - 5.0 * len(atoms)
    atoms.arrays["forces_new"] = other.get_forces()
    return atoms


def upstream_options(path: str, targets: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """A data set as upstream's options files have it."""
    return {
        "systems": {"read_from": path, "reader": "ase", "length_unit": "angstrom"},
        "targets": {
            name: {
                "quantity": "energy",
                "read_from": path,
                "reader": "ase",
                "key": keys["energy"],
                "unit": "eV",
                "forces": {"read_from": path, "reader": "ase", "key": keys["forces"]},
                # Upstream looks for it, unless told not to.
                "stress": name == "energy"
                and {"read_from": path, "reader": "ase", "key": "stress"},
            }
            for name, keys in targets.items()
        },
    }


def train_upstream(data: Any, validation: Any, **more: Any) -> None:
    training = {"num_epochs": 1, "batch_size": 4, "num_workers": 0, "learning_rate": 1e-3}
    options = {
        "architecture": {"name": "pet", "model": TINY, "training": training},
        "base_precision": 64,
        "device": "cpu",
        "training_set": data,
        "validation_set": validation,
        "test_set": 0.0,
        "final_eval": False,
    }
    train_model(OmegaConf.create(options), **more)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of `mtt train`, and data of two levels in one file and in two."""
    folder = tmp_path_factory.mktemp("pretrained")
    frames = [label(make_structure(seed)) for seed in range(1, 19)]
    plain = {"energy": "energy", "forces": "forces"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, part in (("train", frames[:12]), ("validation", frames[12:])):
            ase.io.write(f"{name}.xyz", part, format="extxyz")
        data, validation = (
            upstream_options(f"{name}.xyz", {"energy": plain}) for name in ("train", "validation")
        )
        train_upstream(data, validation)
        Path("model.ckpt").rename("pretrained.ckpt")
    return folder


def data_set(file: str, target: str, names: Mapping[str, str]) -> dict[str, Any]:
    lacks = ["stress"] if target == NEW else []
    return {"path": file, "name": target, "options": {"target": target, "lacks": lacks, **names}}


# Name -> the data sets' targets, model.options, [finetune], the export's targets. Both targets of
# several are in one file.
WAYS: dict[str, tuple[list[str], dict[str, Any], dict[str, Any], list[str]]] = {
    "full": (["energy"], {"stress": True}, {}, ["energy"]),
    "heads": ([NEW], {"keep_targets": True}, {"method": "heads"}, ["energy", NEW]),
    "inherit": ([NEW], {"target": NEW, "inherit_heads": "energy"}, {}, [NEW]),
    "multi-fidelity": (
        ["energy", NEW],
        {"stress": True, "targets": {NEW: {"inherit_heads": "energy"}}},
        {},
        ["energy", NEW],
    ),
    "lora": ([NEW], {"lora": {"merge": False}}, {"method": "lora"}, [NEW]),
    "merged": ([NEW], {"lora": {}}, {"method": "lora"}, [NEW]),
}


@pytest.mark.parametrize("way", WAYS)
def test_there_and_back(
    way: str, pretrained: Path, fastft: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained, options, finetune, exported = WAYS[way]
    monkeypatch.chdir(tmp_path)
    keys = {"energy": {"energy": "energy", "forces": "forces"}, NEW: NAMES}
    data: dict[str, Any] = {
        split: [data_set(f"{pretrained}/{split}.xyz", t, keys[t]) for t in trained]
        for split in ("train", "validation")
    }
    tree = {
        "run": {"folder": "run", "steps": 4, "device": "cpu"},
        "model": {
            "adapter": "pet",
            "checkpoint": str(pretrained / "pretrained.ckpt"),
            "options": {"dtype": "float64", **options},
        },
        "finetune": finetune,
        # Only what is periodic has a stress.
        "data": {**data, "batch_size": 6, "checks": {"ignore": ["missing"]}},
        "optim": {"name": "adam", "lr": 0.01},
        "log": {"tensorboard": False},
    }
    Path("run.toml").write_text(tomli_w.dumps(tree))
    for command in (
        ("train", "run.toml"),
        ("evaluate", "run.toml"),
        ("export", "run.toml", "--to", "tuned.ckpt"),
    ):
        outcome = fastft(*command)
        assert (outcome.errors, outcome.code) == ("", 0)
    export_model("tuned.ckpt", "tuned.pt")
    model = load_atomistic_model("tuned.pt")
    outputs = model.capabilities().outputs
    assert [name for name in outputs if name.startswith("energy")] == exported
    scores = json.loads(Path("run/evaluation-validation.json").read_text())["values"]
    compared = errors_of(model, pretrained / "validation.xyz", {t: keys[t] for t in trained})
    assert len(compared) == 4 * len(trained) + 2 * ("energy" in trained)
    for name, value in compared.items():
        assert scores[name] == pytest.approx(value, rel=1e-5), name
    molecular_dynamics(trained[-1])
    both = [
        upstream_options(f"{pretrained}/{split}.xyz", {t: keys[t] for t in exported})
        for split in data
    ]
    train_upstream(*both, restart_from="tuned.ckpt")


def errors_of(model: Any, file: Path, targets: Any) -> dict[str, float]:
    """What `mtt eval` says, by fastft's names."""
    said: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        logger = type(
            "Logger", (), {"__init__": lambda *_, **__: None, "log": lambda _, m: said.update(m)}
        )
        patch.setattr(metatrain.cli.eval, "MetricLogger", logger)
        eval_model(
            model,
            OmegaConf.create(upstream_options(str(file), targets)),
            batch_size=6,
            warm_up=False,
        )
    found = {}
    energies: Any = dict.fromkeys(targets, SimpleNamespace(quantity="energy"))
    for name, value in said.items():
        key, kind, *_ = name.split()
        name = to_external_name(key, energies)
        per = "angstrom" if name.startswith("forces") else "atom"
        found[f"{name}_{kind.lower()}_mev_per_{per}"] = 1e3 * value
    return found


def molecular_dynamics(target: str) -> None:
    atoms = make_structure(5)
    variants: dict[str, str | None] = {}
    if target != "energy":
        variants["energy"] = target.removeprefix("energy/")
    atoms.calc = MetatomicCalculator("tuned.pt", variants=variants)
    before = atoms.positions.copy()
    VelocityVerlet(atoms, timestep=0.1).run(10)
    assert np.isfinite(atoms.positions).all()
    assert (atoms.positions != before).any()


def test_the_options_that_upstream_writes(pretrained: Path, fastft: Any) -> None:
    """Its complete form of an options file: every default spelt out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pretrained)
        outcome = fastft("convert", "options_restart.yaml", "--to", "run.toml")
        assert (outcome.errors, outcome.code) == ("", 0)
        config = read_run_file(Path("run.toml"))
        settings = (
            *("run.device=cpu", "step.compile=off"),
            "data.checks.ignore=['missing', 'leakage']",
        )
        outcome = fastft("train", "run.toml", *settings)
        assert (outcome.errors, outcome.code) == ("", 0)
    assert config.run.steps == 3
    assert config.model.options["stress"] is True
    assert config.model.options["dtype"] == "float64"
