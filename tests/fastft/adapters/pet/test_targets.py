"""Several targets, low-rank updates, and under which names exports hold what."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase
import ase.io
import ase.units
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from metatomic_ase import MetatomicCalculator
from metatrain.pet.modules.finetuning import LoRALinear
from upstream_pet import Upstream

from fastft.adapters.pet.baseline import Baseline, composition, fit_baseline
from fastft.adapters.pet.checkpoint import read_model
from fastft.config import DataConfig, DataSource, FinetuneConfig, NewHead
from fastft.errors import ConfigError
from fastft.finetune import apply_method
from fastft.task import Batch

NEW = "energy/new"
KINDS = ("node_heads", "edge_heads", "node_last_layers", "edge_last_layers")


@pytest.fixture
def checkpoint(make_adapter: Any, build: Any, atoms_file: Path, tmp_path: Path) -> Path:
    """Of the target 'energy', in float64."""
    adapter = make_adapter(dtype="float64")
    task = build(adapter)
    fit_baseline(
        task.model, "energy", adapter.dataset(DataSource(path=atoms_file), "train").samples
    )
    adapter.save(task, tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt"


@pytest.fixture
def tuned(make_adapter: Any, build: Any, checkpoint: Path, atoms_file: Path) -> Callable[..., Any]:
    """An adapter over the checkpoint and its task, for data sets of these targets."""

    def make(*targets: str, evaluated: str | None = None, **options: Any) -> tuple[Any, Any]:
        adapter = make_adapter(elements=[], dtype="float64", **options)
        adapter.expect(data_of(atoms_file, targets, [evaluated] if evaluated else []), {})
        return adapter, build(adapter, checkpoint)

    return make


def data_of(file: Path, targets: Any, evaluated: Any = ()) -> DataConfig:
    train, validation = (
        [DataSource(path=file, name=name, options={"target": name}) for name in names]
        for names in (targets, evaluated)
    )
    return DataConfig(train=tuple(train), validation=tuple(validation))


def loss_of(adapter: Any, task: Any, file: Path, target: str) -> Any:
    data = adapter.dataset(DataSource(path=file, options={"target": target}), "validation")
    samples = [adapter.transform(data[i], "validation") for i in range(len(data))]
    task.model.eval()
    with torch.no_grad():
        return task.loss(task.model, Batch(adapter.collate(samples), len(samples)))


def predict(adapter: Any, task: Any, file: Path, target: str) -> torch.Tensor:
    found = loss_of(adapter, task, file, target).predictions
    return torch.cat([found["energy"], found["forces"].flatten()])


def fit(adapter: Any, task: Any, file: Path) -> None:
    """Composition energies and scale of the run's first target, as before training."""
    source = DataSource(path=file, options={"target": adapter.targets.trained[0]})
    adapter.dataset(source, "train")
    adapter.prepare(task, SimpleNamespace(sources=[DataSource(path=file, name=str(file))]))


def tripled(file: Path, folder: Path) -> Path:
    """The structures with three times their energies, and so three times the scale."""
    frames = ase.io.read(file, ":")
    assert isinstance(frames, list)
    for atoms in frames:
        atoms.calc.results["energy"] = 3 * atoms.get_potential_energy()  # type: ignore[union-attr]
    ase.io.write(folder / "tripled.xyz", frames, format="extxyz")
    return folder / "tripled.xyz"


def relabelled(file: Path, to: Path, said: torch.Tensor) -> list[ase.Atoms]:
    """The structures with predicted energies and forces, and 5 more for each atom."""
    frames = ase.io.read(file, ":")
    assert isinstance(frames, list)
    forces = said[len(frames) :].reshape(-1, 3).split([len(atoms) for atoms in frames])
    for atoms, energy, own in zip(frames, said, forces, strict=False):
        energy = energy.item() + 5 * len(atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=own.numpy())
    ase.io.write(to, frames, format="extxyz")
    return frames


def alone(model: Any, frames: list[ase.Atoms], target: str) -> torch.Tensor:
    """What composition says of all that `predict` returns: nothing of forces."""
    own, _ = composition(model, target)
    energies = [sum(own[number] for number in atoms.numbers) for atoms in frames]
    return torch.tensor([*energies, *[0.0] * sum(3 * len(a) for a in frames)], dtype=torch.float64)


def randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight)


def test_targets_are_those_of_the_data_sets(tuned: Any) -> None:
    adapter, task = tuned(NEW, "energy", evaluated="energy", target=NEW)
    assert adapter.targets.names == (NEW, "energy")
    assert set(task.new_heads) == {f"backend.{kind}.{NEW}" for kind in KINDS}
    assert set(task.heads) == {f"backend.{k}.{t}" for k in KINDS for t in (NEW, "energy")}
    assert list(task.notes) == [
        f"new target '{NEW}': its heads start at random",
        "target 'energy': its composition energies and scale stay",
    ]


def test_targets_that_are_only_evaluated_are_kept(tuned: Any) -> None:
    adapter, task = tuned(NEW, evaluated="energy", target=NEW)
    assert adapter.targets.names == (NEW, "energy")
    assert list(task.model.dataset_info.targets) == ["energy", NEW]
    assert task.notes[-1].startswith("targets kept, but not trained: 'energy'")
    assert set(task.heads) == {f"backend.{kind}.{NEW}" for kind in KINDS}
    _, task = tuned(NEW, target=NEW)
    assert list(task.model.dataset_info.targets) == [NEW]
    assert task.notes[-1].startswith("targets dropped, since no data set holds them: 'energy'")


def test_each_target_is_fitted_to_its_own_data(
    tuned: Any, checkpoint: Path, structures: list[ase.Atoms], tmp_path: Path
) -> None:
    adapter, task = tuned("energy", NEW)
    for atoms in structures[3:]:
        atoms.calc.results["energy"] = 2 * atoms.get_potential_energy()  # type: ignore[union-attr]
    ase.io.write(tmp_path / "new.xyz", structures[3:], format="extxyz")
    source = DataSource(path=tmp_path / "new.xyz", name="new", options={"target": NEW})
    adapter.dataset(source, "train")
    adapter.dataset(DataSource(path=tmp_path / "atoms.xyz", name="old"), "train")
    loader = type(
        "Loader", (), {"sources": [DataSource(path=tmp_path, name=n) for n in ("old", "new")]}
    )
    adapter.prepare(task, loader)
    old = read_model(checkpoint)
    assert old is not None
    for one, other in zip(Baseline("energy")(task.model), Baseline("energy")(old), strict=True):
        assert torch.equal(one, other)
    upstream = Upstream(tuned(NEW, target=NEW)[1].model, tmp_path / "new.xyz", NEW, stress=False)
    upstream.fit()
    for ours, theirs in zip(Baseline(NEW)(task.model), Baseline(NEW)(upstream.model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("unit", ["eV", "Hartree"])
@pytest.mark.parametrize("rescale", [True, False])
def test_inherited_heads_begin_at_the_old_potential(
    tuned: Any, atoms_file: Path, tmp_path: Path, rescale: bool, unit: str
) -> None:
    """On labels that the old potential made, with other energies of the atoms."""
    old_adapter, old = tuned("energy")
    per_unit = getattr(ase.units, unit)
    file = tmp_path / "new.xyz"
    said = predict(old_adapter, old, atoms_file, "energy") / per_unit
    frames = relabelled(atoms_file, file, said)
    options = {"target": NEW, "inherit_heads": "energy", "unit": unit, "rescale_heads": rescale}
    adapter, task = tuned(NEW, **options)
    fit(adapter, task, file)
    ratio = Baseline("energy")(old.model)[1] / Baseline(NEW)(task.model)[1] / per_unit
    assert not 0.9 < ratio < 1.1
    # Weights are upstream's to the bit, unless rescaled.
    before, after = old.model.state_dict(), task.model.state_dict()
    for name in [name for name in after if f".{NEW}." in name]:
        factor = ratio if rescale and "last_layers" in name else 1
        expected = before[name.replace(NEW, "energy")] * factor
        # By the packages' electronvolts per hartree.
        torch.testing.assert_close(after[name], expected, rtol=1e-7 if rescale else 0, atol=0)
    said = said - alone(old.model, frames, "energy") / per_unit
    says = predict(adapter, task, file, NEW) - alone(task.model, frames, NEW)
    torch.testing.assert_close(says, said if rescale else said / ratio, rtol=1e-7, atol=1e-7)
    forces = loss_of(adapter, task, file, NEW).parts["forces"]
    assert forces < 1e-12 if rescale else forces > 1e-2


@pytest.mark.parametrize("lora", [None, {"target_modules": [f"{NEW}___0"]}])
def test_heads_are_rescaled_once(tuned: Any, atoms_file: Path, tmp_path: Path, lora: Any) -> None:
    """As in a run that goes on: its weights are loaded before scales are fitted again."""
    options = {"targets": {NEW: {"inherit_heads": "energy"}}, "lora": lora}
    adapter, task = tuned(NEW, "energy", **options)
    fit(adapter, task, tripled(atoms_file, tmp_path))
    randomise(task.model)
    trained = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    adapter, task = tuned(NEW, "energy", **options)
    task.model.load_state_dict(trained)
    fit(adapter, task, tripled(atoms_file, tmp_path))
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


@pytest.mark.parametrize("rescale", [True, False])
def test_a_target_that_is_fitted_anew_keeps_its_potential(
    tuned: Any, atoms_file: Path, tmp_path: Path, rescale: bool
) -> None:
    lora = {"target_modules": ["energy___0"]}
    adapter, task = tuned("energy", fit="always", rescale_heads=rescale, lora=lora)
    # As updates of a checkpoint that upstream trained.
    randomise(task.model)
    old = predict(adapter, task, atoms_file, "energy")
    before = Baseline("energy")(task.model)[1]
    fit(adapter, task, tripled(atoms_file, tmp_path))
    new = predict(adapter, task, atoms_file, "energy")
    ratio = before / Baseline("energy")(task.model)[1]
    assert ratio == pytest.approx(1 / 3)
    factor = 1 if rescale else ratio
    torch.testing.assert_close(new[12:] * factor, old[12:], rtol=1e-10, atol=1e-10)
    shown = "not rescaled" if not rescale else "rescaled"
    assert task.notes[0].endswith(f"are fitted anew, its heads {shown}")


def test_heads_at_random_are_not_rescaled(tuned: Any, atoms_file: Path, tmp_path: Path) -> None:
    adapter, task = tuned(NEW, target=NEW)
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    fit(adapter, task, tripled(atoms_file, tmp_path))
    for name, parameter in task.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("head", "rescaled"),
    [
        ("backend.node_heads.energy", {"edge_last_layers"}),
        ("backend.edge_last_layers.energy.0.energy___0.weight", {"node_last_layers"}),
        ("backend.gnn_layers", {"node_last_layers", "edge_last_layers"}),
        ("backend", set()),
    ],
)
def test_new_heads_at_random_are_not_rescaled(
    make_adapter: Any, build: Any, checkpoint: Path, atoms_file: Path, head: str, rescaled: set[str]
) -> None:
    adapter = make_adapter(elements=[], dtype="float64", fit="always")
    adapter.expect(data_of(atoms_file, ["energy"]), {head: NewHead()})
    task = build(adapter, checkpoint)
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    fit(adapter, task, tripled(atoms_file, atoms_file.parent))
    changed = {n for n, p in task.model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split(".")[1] for name in changed} == rescaled
    said = "target 'energy': its heads that start at random by finetune.new_heads are not rescaled"
    assert (said in task.notes) == (len(rescaled) < 2)


def test_low_rank_updates_start_as_the_checkpoint(tuned: Any, atoms_file: Path) -> None:
    adapter, plain = tuned("energy")
    theirs = predict(adapter, plain, atoms_file, "energy")
    adapter, updated = tuned("energy", lora={"rank": 2})
    ours = predict(adapter, updated, atoms_file, "energy")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    # By upstream's names.
    attention = "backend.gnn_layers.0.trans.layers.0.attention"
    assert f"{attention}.input_linear.lora_A.weight" in updated.low_rank
    assert set(updated.low_rank) <= set(updated.added)


@pytest.mark.parametrize("lora", [{}, None], ids=["upstream's", "fastft's"])
@pytest.mark.parametrize("inherit", ["energy", None])
def test_new_heads_are_trained_with_updates(tuned: Any, lora: Any, inherit: Any) -> None:
    options = {"lora": lora} if lora is not None else {}
    _, task = tuned(NEW, target=NEW, inherit_heads=inherit, **options)
    apply_method(task, FinetuneConfig(method="lora"))
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    heads = {name for name in trained if f".{NEW}." in name and ".lora_" not in name}
    assert heads == {name for name, _ in task.model.named_parameters() if f".{NEW}." in name}
    assert trained > heads
    assert all(".lora_" in name for name in trained - heads)


@pytest.mark.parametrize("merge", [True, False])
def test_updates_are_merged_at_the_export(
    tuned: Any, make_adapter: Any, build: Any, atoms_file: Path, tmp_path: Path, merge: bool
) -> None:
    adapter, task = tuned("energy", lora={"rank": 2, "merge": merge})
    randomise(task.model)
    predicted = predict(adapter, task, atoms_file, "energy")
    adapter.save(task, tmp_path / "new.ckpt")
    assert any(".lora_" in name for name in task.model.state_dict())
    model = read_model(tmp_path / "new.ckpt")
    assert model is not None
    assert any(".lora_" in name for name in model.state_dict()) != merge
    again = make_adapter(elements=[], dtype="float64")
    found = predict(again, build(again, tmp_path / "new.ckpt"), atoms_file, "energy")
    torch.testing.assert_close(found, predicted, rtol=1e-10, atol=1e-10)
    if not merge:
        other = make_adapter(elements=[], dtype="float64", lora={"rank": 3})
        with pytest.raises(ConfigError, match=r"model\.options\.lora: must be the checkpoint's, "):
            build(other, tmp_path / "new.ckpt")


def test_a_variant_is_exported_as_energy(
    tuned: Any,
    make_adapter: Any,
    build: Any,
    atoms_file: Path,
    structures: list[ase.Atoms],
    tmp_path: Path,
) -> None:
    adapter, task = tuned(NEW, "energy", target=NEW, unit="Hartree", export_as_energy=NEW)
    samples = adapter.dataset(DataSource(path=atoms_file), "train").samples
    fit_baseline(task.model, NEW, [{**s, "energy": 3 * s["energy"]} for s in samples])
    predicted = predict(adapter, task, atoms_file, NEW)
    adapter.save(task, tmp_path / "new.ckpt")
    assert set(task.model.dataset_info.targets) == {"energy", NEW}
    model = read_model(tmp_path / "new.ckpt")
    assert model is not None
    assert list(model.dataset_info.targets) == ["energy"]
    assert model.dataset_info.targets["energy"].unit == "Hartree"
    assert not any(NEW in name for name in model.state_dict())
    again = make_adapter(elements=[], dtype="float64")
    found = predict(again, build(again, tmp_path / "new.ckpt"), atoms_file, "energy")
    assert torch.equal(found, predicted)
    # What engines find that ask for no variant.
    model.export().save(str(tmp_path / "new.pt"))
    atoms = structures[9].copy()
    atoms.calc = MetatomicCalculator(str(tmp_path / "new.pt"))
    energy = predicted[9].item() * ase.units.Hartree
    assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-8)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ([NEW], {}, None),
        (
            ["energy"],
            {"inherit_heads": "energy"},
            "model.options.inherit_heads: must be absent where the checkpoint has heads of the"
            " target, 'energy'; got 'energy'; remove it",
        ),
        (
            ["energy", NEW],
            {"targets": {NEW: {"inherit_heads": "energi"}}},
            f"model.options.targets.{NEW}.inherit_heads: must name a target of the checkpoint;"
            f" got 'energi' for '{NEW}'; did you mean 'energy'?",
        ),
        (
            ["energy"],
            {"targets": {"energy/nwe": {}}},
            "model.options.targets: must be named by data sets, and not be model.options.target;"
            " got 'energy/nwe'; did you mean 'energy'?",
        ),
        ([NEW], {"unit": "eV"}, "model.options.target: must be a data set's, where inherit_heads"),
        (["energy"], {"unit": "Hartree"}, "model.options.unit: must be that of the checkpoint's"),
        (
            [NEW],
            {"target": NEW, "unit": "furlong"},
            "model.options.unit: must be an energy's unit that metatomic knows; got 'furlong'",
        ),
        (
            ["energy"],
            {"export_as_energy": "energy/x"},
            "model.options.export_as_energy: must be a target of the model; got 'energy/x'",
        ),
        (
            ["energy"],
            {"head_modules": ["node_head"]},
            "model.options.head_modules: must be modules of PET; got 'node_head'; did you mean"
            " 'node_heads'?",
        ),
        (
            ["energy"],
            {"lora": {"target_modules": ["input_line"]}},
            "model.options.lora.target_modules: must be last parts of names of linear modules; got"
            " 'input_line'; did you mean 'input_linear'?",
        ),
    ],
)
def test_bad_targets(tuned: Any, targets: Any, options: Any, message: str | None) -> None:
    if message is None:
        tuned(*targets, **options)
        return
    with pytest.raises(ConfigError) as error:
        tuned(*targets, **options)
    assert error.value.problems[0].startswith(message)


def test_losses_of_targets_add_up_where_batches_mix_them(
    make_adapter: Any, build: Any, checkpoint: Path, atoms_file: Path
) -> None:
    for mixing, targets, term in (
        ("sample", ["energy", NEW], NEW),
        ("batch", ["energy", NEW], ""),
        ("sample", [NEW], ""),
    ):
        adapter = make_adapter(elements=[], dtype="float64")
        adapter.expect(replace(data_of(atoms_file, targets), mixing=mixing), {})
        assert loss_of(adapter, build(adapter, checkpoint), atoms_file, NEW).term == term


def take_unit_off(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=False)
    content["model_data"]["dataset_info"].targets["energy"].unit = ""
    torch.save(content, checkpoint)


def test_heads_of_a_target_whose_unit_is_stated(tuned: Any, checkpoint: Path) -> None:
    take_unit_off(checkpoint)
    options = {"unit": "eV", "targets": {NEW: {"inherit_heads": "energy", "unit": "Hartree"}}}
    _, task = tuned("energy", NEW, **options)
    assert not any("taken to be" in note for note in task.notes)
    old, new = (Baseline(target)(task.model)[1] for target in ("energy", NEW))
    assert (old / new).item() == pytest.approx(ase.units.Hartree, rel=1e-6)
    _, task = tuned(NEW, evaluated="energy", target=NEW, targets={"energy": {"unit": "eV"}})
    assert task.notes[0].endswith("no unit; it is eV, from model.options.targets.energy")
    assert task.model.dataset_info.targets["energy"].unit == "eV"
    for unit in ("furlong", "angstrom"):
        message = rf"model\.options\.unit: must be an energy's unit that metatomic .*got '{unit}'"
        with pytest.raises(ConfigError, match=message):
            tuned("energy", unit=unit)


@pytest.mark.parametrize(("unit", "taken"), [(None, "eV"), ("Hartree", "Hartree")])
def test_heads_without_a_unit(tuned: Any, checkpoint: Path, unit: Any, taken: str) -> None:
    options = {"target": NEW, "inherit_heads": "energy", "unit": unit}
    started = f"new target '{NEW}': its heads start as those of 'energy', rescaled"
    assert tuned(NEW, **options)[1].notes[0] == started
    take_unit_off(checkpoint)
    said = f"; 'energy' states no unit and is taken to be in {taken}, as '{NEW}' is"
    assert tuned(NEW, **options)[1].notes[0] == started + said


def test_heads_of_another_quantity(tuned: Any, checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=False)
    content["model_data"]["dataset_info"].targets["energy"].quantity = "dipole"
    torch.save(content, checkpoint)
    message = r"model\.options\.inherit_heads: must name an energy; got 'energy', which is another"
    with pytest.raises(ConfigError, match=message):
        tuned(NEW, target=NEW, inherit_heads="energy")


def test_a_target_that_is_evaluated_must_be_there(tuned: Any) -> None:
    with pytest.raises(ConfigError, match="data: targets that are evaluated must be trained, or"):
        tuned("energy", evaluated="energy/other")


def test_heads_by_upstreams_names(tuned: Any) -> None:
    options = {"head_modules": [], "last_layer_modules": ["backend.node_last_layers"]}
    _, task = tuned("energy", **options)
    assert task.heads == ["backend.node_last_layers.energy"]
    _, task = tuned("energy", head_modules=["gnn_layers.1"], last_layer_modules=[])
    assert task.heads == ["backend.gnn_layers.1"]
