"""Checkpoints both ways: those that upstream wrote, and those that it is to read."""

import gzip
from pathlib import Path
from typing import Any, cast

import ase.units
import metatrain.pet
import pytest
import torch
from ase.md.verlet import VelocityVerlet
from metatomic_ase import MetatomicCalculator
from metatrain.pet.modules.finetuning import apply_finetuning_strategy
from metatrain.utils.data import DatasetInfo
from metatrain.utils.data.target_info import get_energy_target_info
from metatrain.utils.io import load_model, trainer_from_checkpoint
from upstream_pet import Upstream

from fastft.adapters.pet.baseline import fit_baseline
from fastft.checkpoint import Weights, load_weights
from fastft.config import DataSource, ModelConfig, NewHead
from fastft.errors import CheckpointError, ConfigError
from fastft.task import Batch

FIXTURES = Path(metatrain.pet.__file__).parent / "tests" / "checkpoints"


@pytest.fixture
def saved(make_adapter: Any, build: Any, atoms_file: Path, tmp_path: Path) -> Any:
    """Writes a fitted model's checkpoint: its path, the task, and its predictions of the file."""

    def make(**options: Any) -> tuple[Path, Any, Any]:
        adapter = make_adapter(**options)
        task = build(adapter)
        data = adapter.dataset(DataSource(path=atoms_file), "train")
        fit_baseline(task.model, adapter.options.target, data.samples)
        path = tmp_path / "saved.ckpt"
        adapter.save(task, path)
        return path, task, predict(adapter, task, data)

    return make


def predict(adapter: Any, task: Any, data: Any) -> dict[str, torch.Tensor]:
    samples = [adapter.transform(data[i], "validation") for i in range(len(data))]
    task.model.eval()
    with torch.no_grad():
        return task.loss(task.model, Batch(adapter.collate(samples), len(samples))).predictions


def load(adapter: Any, task: Any, path: Path, **heads: NewHead) -> Any:
    weights = Weights(path, "torch", dict(adapter.weights(path)))
    config = ModelConfig(adapter="pet")
    return load_weights(task.model, weights, config, heads, [*task.added, *task.low_rank])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_upstream_predicts_the_same(
    saved: Any, atoms_file: Path, dtype: str, tolerance: float
) -> None:
    path, task, ours = saved(dtype=dtype)
    model = load_model(path)
    exported = model.export().to(getattr(torch, dtype))
    theirs = Upstream(task.model, atoms_file, stress=False).predict(exported.eval())
    largest = theirs["forces"].abs().max().item()
    assert (ours["forces"] - theirs["forces"]).abs().max() <= tolerance * largest
    # Upstream adds the composition in the model's precision, fastft in float64.
    energy = ours["energy"].to(theirs["energy"].dtype)
    torch.testing.assert_close(energy, theirs["energy"], rtol=tolerance, atol=0)


def test_a_checkpoint_loads_as_it_was(
    saved: Any, make_adapter: Any, build: Any, atoms_file: Path
) -> None:
    path, task, ours = saved()
    # The run file that made it may be used as it is.
    adapter = make_adapter()
    again = build(adapter, path)
    report = load(adapter, again, path)
    assert not report.new
    assert report.coverage == 1.0
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    data = adapter.dataset(DataSource(path=atoms_file), "train")
    for name, predicted in predict(adapter, again, data).items():
        assert torch.equal(predicted, ours[name])


def test_heads_change_places(saved: Any, make_adapter: Any, build: Any) -> None:
    """What one is filled with is the checkpoint's, whatever has become of the other."""
    path, task, _ = saved()
    places = ["backend.node_heads.energy", "backend.edge_heads.energy"]
    adapter = make_adapter()
    again = build(adapter, path)
    swapped = zip(places, reversed(places), strict=True)
    load(adapter, again, path, **{to: NewHead(init="inherit", source=a) for to, a in swapped})
    for one, other in (places, reversed(places)):
        old = task.model.get_submodule(one).state_dict()
        for name, tensor in again.model.get_submodule(other).state_dict().items():
            assert torch.equal(tensor, old[name])


@pytest.mark.parametrize("lora", [None, {}])
@pytest.mark.parametrize("head", ["backend.node_heads.energy", "backend"])
def test_new_heads_are_not_the_checkpoints(
    saved: Any, make_adapter: Any, build: Any, head: str, lora: Any
) -> None:
    path, _, _ = saved()
    content = torch.load(path, weights_only=False)
    for name, tensor in content["best_model_state_dict"].items():
        if name.startswith("backend.") and tensor.is_floating_point():
            tensor.fill_(7)
    torch.save(content, path)
    adapter = make_adapter(lora=lora)
    task = build(adapter, path)
    report = load(adapter, task, path, **{head: NewHead()})
    for name, parameter in task.model.named_parameters():
        assert (parameter != 7).all() if name in report.new else (parameter == 7).all(), name
    # Updates, which no checkpoint fills, still add nothing.
    assert not any(p.any() for n, p in task.model.named_parameters() if ".lora_B." in n)


def test_training_goes_on_upstream(saved: Any) -> None:
    path, _, _ = saved()
    for context in ("restart", "finetune"):
        content = torch.load(path, weights_only=False)
        trainer_from_checkpoint(content, context, {})
        assert load_model(path).dataset_info.targets["energy"].unit == "eV"


def test_a_unit_that_the_checkpoint_does_not_state(
    saved: Any, make_adapter: Any, build: Any, atoms_file: Path, structures: Any, tmp_path: Path
) -> None:
    path, _, ours = saved(dtype="float64")
    content = torch.load(path, weights_only=False)
    content["model_data"]["dataset_info"].targets["energy"].unit = ""
    torch.save(content, path)
    adapter = make_adapter(elements=[], dtype="float64", unit="Hartree")
    task = build(adapter, path)
    assert list(task.notes) == [
        "target 'energy': the checkpoint states no unit; it is Hartree, from model.options",
        "target 'energy': its composition energies and scale stay",
    ]
    found = predict(adapter, task, adapter.dataset(DataSource(path=atoms_file), "train"))
    assert torch.equal(found["energy"], ours["energy"])
    adapter.save(task, tmp_path / "new.ckpt")
    # Upstream goes on in no other unit than the checkpoint's.
    stated: Any = {"unit": "Hartree", "description": ""}
    target = get_energy_target_info("energy", stated, True, False)
    info = DatasetInfo("angstrom", [1, 6, 8], {"energy": target})
    before, after = (cast(Any, load_model(file)) for file in (path, tmp_path / "new.ckpt"))
    with pytest.raises(ValueError, match="different target information for target 'energy'"):
        before.restart(info)
    for model in (after.restart(info), task.model):
        model.export().save(str(tmp_path / "new.pt"))
        atoms = structures[9].copy()
        atoms.calc = MetatomicCalculator(str(tmp_path / "new.pt"))
        energy = ours["energy"][9].item() * ase.units.Hartree
        assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-8)


def test_molecular_dynamics(saved: Any, structures: Any, tmp_path: Path) -> None:
    path, _, _ = saved()
    load_model(path).export().save(str(tmp_path / "model.pt"))
    atoms = structures[9].copy()
    atoms.calc = MetatomicCalculator(str(tmp_path / "model.pt"))
    before = atoms.positions.copy()
    VelocityVerlet(atoms, timestep=0.1).run(3)
    assert (atoms.positions != before).any()


@pytest.mark.parametrize("inherit", [None, "energy"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_new_target(
    saved: Any, make_adapter: Any, build: Any, tmp_path: Path, inherit: str | None, keep: bool
) -> None:
    path, task, _ = saved()
    options = {"target": "energy/pbe0", "inherit_heads": inherit, "keep_targets": keep}
    adapter = make_adapter(elements=[], unit="Hartree", description="PBE0", **options)
    new = build(adapter, path)
    report = load(adapter, new, path)
    assert set(report.new) == set(new.added)
    old, state = task.model.state_dict(), new.model.state_dict()
    head = "backend.node_heads.energy{}.0.0.weight"
    same = torch.equal(state[head.format("/pbe0")], old[head.format("")])
    assert same == (inherit is not None)
    assert (head.format("/pbe0") in report.new) == (inherit is None)
    assert (head.format("") in state) == keep
    assert all("pbe0" in name for name in new.added)
    body = "backend.gnn_layers.0.compress.0.weight"
    assert torch.equal(state[body], old[body])
    adapter.save(new, tmp_path / "new.ckpt")
    saved_again = load_model(tmp_path / "new.ckpt")
    assert "energy/pbe0" in saved_again.export().capabilities().outputs
    info = saved_again.dataset_info
    assert list(info.targets) == (["energy", "energy/pbe0"] if keep else ["energy/pbe0"])
    assert info.targets["energy/pbe0"].unit == "Hartree"
    assert info.targets["energy/pbe0"].description == "PBE0"
    assert "targets" in str(adapter.describe(tmp_path / "new.ckpt"))


@pytest.mark.parametrize("version", ["model-v1_trainer-v1", "model-v16_trainer-v15"])
def test_old_formats(version: str, make_adapter: Any, build: Any, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    path.write_bytes(gzip.decompress((FIXTURES / f"{version}.ckpt.gz").read_bytes()))
    adapter = make_adapter(elements=[])
    task = build(adapter, path)
    assert load(adapter, task, path).coverage == 1.0
    assert dict(adapter.describe(path).rows)["elements"] == "H, C, N, O"


def test_what_does_not_fit(saved: Any, make_adapter: Any, build: Any, tmp_path: Path) -> None:
    path, task, _ = saved()
    for options, message in (
        ({"elements": ["H"]}, "must be the checkpoint's, H, C, O; got H; remove them"),
        ({"elements": ["H", "C", "O"], "hypers": {"d_pet": 16}}, "d_pet must be the .* 8; got 16"),
        ({"unit": "Hartree"}, r"model\.options\.unit: must be that of the .* 'eV'; got 'Hartree'"),
        ({"inherit_heads": "energy"}, "must be absent where the checkpoint has"),
        ({"target": "energy/x", "inherit_heads": "enrgy"}, "did you mean 'energy'"),
        ({"target": "energy/x", "unit": "parsec"}, "must be an energy's unit"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(make_adapter(**{"elements": [], **options}), path)
    with pytest.raises(ConfigError, match=r"--to: must end in \.ckpt"):
        make_adapter().save(task, tmp_path / "model.pt")
    torch.save({"architecture_name": "soap_bpnn"}, tmp_path / "other.ckpt")
    with pytest.raises(
        CheckpointError, match="must be a checkpoint of PET; got one of 'soap_bpnn'"
    ):
        build(make_adapter(elements=[]), tmp_path / "other.ckpt")
    with pytest.raises(
        CheckpointError, match=r"absent\.ckpt: must be .* got no such file; check the"
    ):
        build(make_adapter(elements=[]), tmp_path / "absent.ckpt")
    with pytest.raises(
        ConfigError, match=r"model\.checkpoint: must be a \.ckpt .*model\.pt'; name"
    ):
        build(make_adapter(elements=[]), tmp_path / "model.pt")
    (tmp_path / "broken.ckpt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="must be a checkpoint of metatrain; got"):
        build(make_adapter(elements=[]), tmp_path / "broken.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elements": []}, r"must name the model's elements .*; got none; add them"),
        ({"elements": ["H", "Cc"]}, "must be chemical symbols; got 'Cc'"),
        ({"hypers": {"d_pett": 8}}, "'d_pett' must be one of upstream's; did you mean 'd_pet'"),
    ],
)
def test_bad_options(make_adapter: Any, build: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(make_adapter(**options))


def test_low_rank_updates_of_upstreams(
    saved: Any, make_adapter: Any, build: Any, tmp_path: Path
) -> None:
    path, _, _ = saved()
    strategy: Any = {"method": "lora", "config": {"rank": 2}, "inherit_heads": {}, "read_from": ""}
    model = apply_finetuning_strategy(load_model(path), strategy)
    torch.save({**torch.load(path, weights_only=False), **lora_part(model)}, path)
    adapter = make_adapter(elements=[])
    task = build(adapter, path)
    assert task.low_rank
    assert all(".lora_" in name for name in task.low_rank)
    assert load(adapter, task, path).coverage == 1.0
    adapter.save(task, tmp_path / "again.ckpt")
    again = load_model(tmp_path / "again.ckpt").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name


def lora_part(model: Any) -> dict[str, Any]:
    content = model.get_checkpoint()
    content["best_model_state_dict"] = content["model_state_dict"]
    return content
