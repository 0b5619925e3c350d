"""`fastft convert`: options files of `mtt train` in their several forms."""

import tomllib
from pathlib import Path
from typing import Any

import ase.io
import pytest

from fastft.adapters.pet import PetOptions
from fastft.runfile import parse, read_run_file

pytestmark = pytest.mark.usefixtures("project")

SHORT = """
architecture:
  name: pet
  model: {d_pet: 8, d_head: 8, d_node: 8, d_feedforward: 8, num_heads: 2, cutoff: 3.0}
  training: {batch_size: 4, num_epochs: 3, learning_rate: 1e-3, weight_decay: 0.01}
training_set: train.xyz
validation_set: 0.25
test_set: 0.0
"""
REFERENCES = """
device: cpu
architecture:
  name: pet
  atomic_types: [1, 6, 8]
  model: {long_range: {enable: true}}
  training:
    {batch_size: 4, num_epochs: 1, finetune: {read_from: a.ckpt, inherit_heads: {energy/x: energy}}}
training_set:
  systems: {read_from: train.xyz, length_unit: angstrom}
  targets:
    energy: {unit: eV, forces: on, stress: off}
    energy/atoms: {quantity: energy, key: E_new, sample_kind: atom, unit: eV}
    energy/old: {quantity: energy, key: E_new, per_atom: true, unit: eV}
    energy/several: {quantity: energy, key: E_new, num_subtargets: 2, unit: eV}
validation_set:
  systems: ${training_set.systems}
  targets: {mtt::dipole: {key: d, type: {cartesian: {rank: 1}}}}
"""
FINETUNE = """
seed: 7
device: gpu
base_precision: 64
architecture:
  name: pet
  training:
    num_epochs: 10
    batch_size: 5
    warmup_fraction: 0.1
    num_workers: 2
    best_model_metric: loss
    loss:
      energy/pbe0: {type: huber, delta: 0.5, weight: 2.0, forces: {type: huber, weight: 10.0}}
    finetune:
      read_from: pretrained.ckpt
      method: heads
      config:
        head_modules: ['node_heads', 'edge_heads']
        last_layer_modules: ['node_last_layers']
      inherit_heads: {energy/pbe0: energy}
training_set:
  systems: {read_from: train.xyz, length_unit: angstrom}
  targets:
    energy/pbe0:
      quantity: energy
      key: E_new
      unit: eV
      description: PBE0
      forces: {key: F_new}
      stress: off
validation_set:
  systems: validation.xyz
  targets: {energy/pbe0: {quantity: energy, key: E_new, forces: {key: F_new}, unit: eV}}
wandb: {project: mine}
"""
TWO_LEVELS = """
architecture:
  name: pet
  atomic_types: [1, 6, 8]
  training:
    batch_size: 2
    num_epochs: 1
    max_atoms_per_batch: 100
    atomic_baseline: {energy: 1.0}
    finetune: {read_from: a.ckpt, method: lora, config: {rank: 2, alpha: 4}}
training_set:
  - systems: {read_from: train.xyz, length_unit: angstrom}
    targets:
      energy: {key: energy, unit: eV, virial: {key: W}}
  - systems: {read_from: validation.xyz, length_unit: angstrom}
    targets:
      energy/new: {quantity: energy, key: E_new, unit: eV, forces: off}
      mtt::dipole: {key: d, type: {cartesian: {rank: 1}}}
    indices: [0, 2, 4]
validation_set:
  - systems: {read_from: train.xyz, length_unit: angstrom}
    targets: {energy: {key: energy, unit: eV}}
    indices: [0, 1, 5]
  - systems: {read_from: validation.xyz, length_unit: angstrom}
    targets: {energy/new: {quantity: energy, key: E_new, unit: eV, forces: off}}
"""


@pytest.fixture
def convert(fastft: Any, structures: Any) -> Any:
    """Converts options: the run file's tree, and what was said."""
    for atoms in structures:
        atoms.info |= {"E_new": 1.0, "W": atoms.get_stress(voigt=False)}
        atoms.arrays["F_new"] = atoms.get_forces()
        atoms.calc.results.pop("stress")
    ase.io.write("train.xyz", structures, format="extxyz")
    ase.io.write("validation.xyz", structures[:7], format="extxyz")

    def run(text: str) -> tuple[dict[str, Any], str]:
        Path("options.yaml").write_text(text)
        Path("run.toml").unlink(missing_ok=True)
        outcome = fastft("convert", "options.yaml", "--to", "run.toml")
        assert (outcome.errors, outcome.code) == ("", 0)
        assert outcome.output.endswith("options.yaml -> run.toml\n")
        config = read_run_file(Path("run.toml"))
        parse(PetOptions, config.model.options)
        return tomllib.loads(Path("run.toml").read_text()), outcome.output

    return run


def test_the_shortest_form(convert: Any, fastft: Any) -> None:
    tree, said = convert(SHORT)
    # Twelve structures: nine are left, two whole batches in each epoch.
    assert tree["run"] == {"folder": "runs/options", "steps": 6}
    assert tree["model"]["options"] == {
        **{"target": "energy", "forces": True, "stress": False, "elements": ["H", "C", "O"]},
        "fill_batches": True,
        "hypers": {
            **{"d_pet": 8, "d_head": 8, "d_node": 8, "d_feedforward": 8, "num_heads": 2},
            "cutoff": 3.0,
        },
    }
    assert tree["data"]["train"] == [{"path": "train.xyz", "options": {"frames": ":9"}}]
    assert tree["data"]["validation"] == [{"path": "train.xyz", "options": {"frames": "9:"}}]
    assert tree["optim"] == {
        **{"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "decay_norms_and_biases": True},
        "schedule": {"name": "cosine", "warmup_steps": 0},
    }
    assert tree["checkpoint"] == {"every_steps": 200, "monitor": "forces_mae_mev_per_angstrom"}
    assert "the last ones of each file" in said
    assert "step.compile, step.cuda_graphs, model.options.fill_batches: are 'blocks'" in said
    assert "training_set.targets.energy.stress: 'stress' is not in every structure" in said
    # What is said is in the file, too.
    assert all(f"# {line}" in Path("run.toml").read_text() for line in said.splitlines()[:-1])
    assert tree["step"] == {"precision": "fp32", "compile": "blocks", "cuda_graphs": "auto"}
    settings = ("run.device=cpu", "step.compile=off", "data.checks.ignore=['missing']")
    outcome = fastft("train", "run.toml", *settings)
    assert (outcome.errors, outcome.code) == ("", 0)


def test_fine_tuning(convert: Any) -> None:
    tree, said = convert(FINETUNE)
    assert tree["run"] == {"folder": "runs/options", "steps": 20, "seed": 7, "device": "cuda"}
    assert tree["model"]["checkpoint"] == "pretrained.ckpt"
    assert tree["finetune"] == {"method": "heads"}
    assert "'energy/pbe0' begins at the old potential; model.options.rescale_heads" in said
    assert tree["model"]["options"] == {
        **{"target": "energy/pbe0", "unit": "eV", "description": "PBE0"},
        **{"inherit_heads": "energy", "keep_targets": True, "dtype": "float64"},
        **{"forces": True, "stress": False, "fill_batches": True},
        **{"head_modules": ["node_heads", "edge_heads"]},
        "last_layer_modules": ["node_last_layers"],
        "loss": {"kind": "huber", "delta": 0.5, "energy": 2.0, "forces": 10.0},
    }
    names = {"energy": "E_new", "forces": "F_new"}
    assert tree["data"] == {
        "train": [{"path": "train.xyz", "options": names}],
        "validation": [{"path": "validation.xyz", "options": names}],
        **{"batch_size": 5, "workers": 2},
    }
    assert tree["optim"]["schedule"]["warmup_steps"] == 2
    assert tree["checkpoint"]["monitor"] == "loss"
    assert "wandb: has no counterpart" in said


def test_two_levels_of_theory(convert: Any) -> None:
    tree, said = convert(TWO_LEVELS)
    assert tree["run"]["steps"] == 6 + 1
    options = tree["model"]["options"]
    assert options["lora"] == {"rank": 2, "alpha": 4.0}
    assert options["targets"] == {"energy/new": {"unit": "eV"}}
    assert (options["forces"], options["stress"]) == (True, True)
    train, validation = tree["data"]["train"], tree["data"]["validation"]
    assert train[0] == {"path": "train.xyz", "options": {"virial": "W"}, "weight": 6.0}
    assert train[1]["options"] == {
        **{"energy": "E_new", "frames": ":5:2", "target": "energy/new"},
        "lacks": ["forces", "stress"],
    }
    assert tree["data"]["mixing"] == "batch"
    assert validation[0]["options"] == {"lacks": ["stress"]}
    for note in (
        "training_set[1].targets.mtt::dipole: has no counterpart",
        "architecture.training.atomic_baseline: has no counterpart",
        "architecture.training.max_atoms_per_batch: has no counterpart; steps and batches",
        "validation_set[0].indices: a run file takes slices only",
        "low-rank updates start at zero here",
    ):
        assert note in said


def test_what_has_no_counterpart_is_said(convert: Any) -> None:
    tree, said = convert(REFERENCES)
    assert tree["data"]["train"] == [{"path": "train.xyz"}]
    assert "validation" not in tree["data"]
    assert "compile" not in tree["step"]
    assert tree["model"]["options"]["hypers"]["long_range"]["enable"] is True
    for note in (
        *(
            f"training_set.targets.energy/{name}: has no counterpart, as only energies of whole"
            for name in ("atoms", "old", "several")
        ),
        "validation_set: has no structures with energies; left out",
        "architecture.atomic_types: has no counterpart; they are the checkpoint's",
        "architecture.training.finetune.inherit_heads.energy/x: is no target that is trained here",
        "architecture.model: long-range interactions (long_range) has no counterpart",
    ):
        assert note in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "options.yaml: must be an options file of metatrain, in YAML; got"),
        ("a: 1", "options.yaml: must be an options file of `mtt train`"),
        (SHORT.replace("name: pet", "name: gap"), "options.yaml: architecture.name: must be 'pet'"),
        (SHORT.replace("train.xyz", "absent.xyz"), "absent.xyz: must be a file that ASE reads"),
        (
            SHORT.replace("batch_size: 4", "batch_size: 40"),
            "options.yaml: architecture.training.batch_size: must",
        ),
        (
            SHORT.replace("validation_set: 0.25", "validation_set: [train.xyz]"),
            "options.yaml: validation_set.0: must be as metatrain takes it; got 'train.xyz'",
        ),
        (
            SHORT.replace("num_epochs: 3", "num_epochs: three"),
            "options.yaml: architecture.training.num_epochs: must be as metatrain takes it; got",
        ),
        (
            SHORT.replace("num_epochs: 3", "num_epoch: 3"),
            "options.yaml: architecture.training.num_epoch: must be as metatrain takes it; got 3",
        ),
        (
            SHORT.replace("train.xyz", "{systems: train.xyz, targets: {energy: {key: energie}}}"),
            "options.yaml: training_set.targets.energy.key: must be in every structure of"
            " train.xyz; got 'energie', which some lack; did you mean 'energy'?; correct it",
        ),
        (
            FINETUNE.replace("validation.xyz", "train.xyz")
            .replace("E_new", "energy")
            .replace("energy/pbe0: {q", "energy: {q"),
            "options.yaml: validation_set.targets.energy: must be a target of training_set; got"
            " others there, 'energy/pbe0'; write targets as there",
        ),
        (
            SHORT.replace("0.01}", "0.01, finetune: {read_from: a, method: lora, config: {}}}"),
            "options.yaml: architecture.training.finetune.config.rank: must be as metatrain takes",
        ),
        (
            SHORT.replace("0.25", "0.5").replace("test_set: 0.0", "test_set: 0.5"),
            "options.yaml: test_set: must be a share of the structures that leaves some for",
        ),
        (
            SHORT.replace("train.xyz", "{systems: train.xyz, targets: {mtt::U0: {key: energy}}}"),
            "options.yaml: training_set.targets: must have an energy, 'energy' or a variant of it",
        ),
    ],
)
def test_what_cannot_be_converted(fastft: Any, structures: Any, text: str, message: str) -> None:
    ase.io.write("train.xyz", structures, format="extxyz")
    Path("options.yaml").write_text(text)
    outcome = fastft("convert", "options.yaml", "--to", "new.toml")
    assert outcome.code == 2
    assert message in outcome.errors
    assert not Path("new.toml").exists()
