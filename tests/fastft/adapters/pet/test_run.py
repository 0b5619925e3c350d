"""Whole runs from the command line: trained, evaluated, exported, fine-tuned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import pytest
import tomli_w
import torch
from metatrain.pet import PET
from safetensors.torch import load_file
from upstream_pet import Upstream

from fastft.adapters.pet.baseline import Baseline, fit_baseline
from fastft.adapters.pet.checkpoint import read_model
from fastft.config import DataSource

EXAMPLES = Path(__file__).parents[4] / "examples" / "pet"


def done(fastft: Any, *arguments: str) -> str:
    outcome = fastft(*arguments)
    assert (outcome.errors, outcome.code) == ("", 0)
    return outcome.output


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_a_run(pet_run: str, fastft: Any) -> None:
    done(fastft, "train", pet_run)
    trained = [r for r in records() if "train/forces" in r]
    assert len(trained) == 4
    assert {"train/energy", "train/forces", "train/stress", "train/loss"} <= trained[0].keys()
    done(fastft, "evaluate", pet_run)
    scores = json.loads(Path("run/evaluation-validation.json").read_text())["values"]
    units = {"energy": "atom", "forces": "angstrom", "stress": "cubic_angstrom"}
    names = {f"{n}_{e}_mev_per_{u}" for n, u in units.items() for e in ("mae", "rmse")}
    assert names <= scores.keys()
    assert scores["forces_mae_mev_per_angstrom"] == pytest.approx(1e3 * scores["mae"], rel=1e-5)
    done(fastft, "export", pet_run, "--to", "tuned.ckpt")
    # What upstream says of the same structures.
    ase.io.write("held-out.xyz", ase.io.read("atoms.xyz", "9:"), format="extxyz")
    model = read_model(Path("tuned.ckpt"))
    assert model is not None
    upstream = Upstream(model, Path("held-out.xyz"))
    made = upstream.predict(model.eval())
    forces = [torch.tensor(atoms.get_forces()) for atoms in ase.io.read("held-out.xyz", ":")]  # type: ignore[union-attr]
    error = (made["forces"] - torch.cat(forces)).abs().mean().item()
    assert scores["forces_mae_mev_per_angstrom"] == pytest.approx(1e3 * error, rel=1e-5)


@pytest.mark.gpu
def test_a_run_on_a_gpu(pet_run: str, fastft: Any) -> None:
    outcome = fastft("train", pet_run, "run.device=cuda")
    assert outcome.errors.startswith("fastft: step.precision: must be 'fp32' or 'tf32'")
    settings = ("run.device=cuda", "step.precision=fp32", "data.workers=2")
    done(fastft, "train", pet_run, *settings)
    done(fastft, "evaluate", pet_run, *settings)
    done(fastft, "export", pet_run, "--to", "tuned.ckpt", *settings)
    assert read_model(Path("tuned.ckpt")) is not None


def test_without_evaluation_and_with_workers(pet_run: str, fastft: Any) -> None:
    without = ("data.validation=[]", "evaluate.metrics=[]")
    done(fastft, "train", pet_run, *without, "data.workers=2")
    first = [r["train/loss"] for r in records() if "train/loss" in r]
    done(fastft, "train", pet_run, *without, "run.folder=again")
    again = Path("again/metrics.jsonl").read_text().splitlines()
    assert first == [r["train/loss"] for r in map(json.loads, again) if "train/loss" in r]


def test_a_resumed_run_is_as_one_that_was_not(pet_run: str, fastft: Any) -> None:
    often = ("checkpoint.every_steps=2", "checkpoint.resume=auto", "checkpoint.keep_last=3")
    done(fastft, "train", pet_run, *often)
    whole = [r for r in records() if "train/loss" in r]
    # The last checkpoint goes, so that the run goes on from step 2.
    for path in Path("run/checkpoints").glob("step-00000004*"):
        path.rename(Path("gone"))
    done(fastft, "train", pet_run, *often)
    last = [r for r in records() if "train/loss" in r][-1]
    assert last["step"] == 4
    assert last["train/loss"] == whole[-1]["train/loss"]


def test_what_a_checkpoint_has(pet_run: str, fastft: Any) -> None:
    """fastft's own say composition energies, too, and one without a target is not scored on it."""
    done(fastft, "train", pet_run)
    weights = "run/checkpoints/step-00000004/model.safetensors"
    settings = ("run.folder=tuned", f"model.checkpoint={weights}", "data.train.0.options.frames=:5")
    done(fastft, "train", pet_run, *settings)
    tuned = load_file("tuned/checkpoints/step-00000004/model.safetensors")
    for name, values in load_file(weights).items():
        assert torch.equal(tuned[name], values) == (
            "buffer" in name or not values.is_floating_point()
        )
    done(fastft, "export", pet_run, "--to", "old.ckpt")
    other = ("--checkpoint", "old.ckpt", "model.options.target=energy/x")
    outcome = fastft("evaluate", pet_run, *other)
    assert outcome.code == 2
    lacks = (
        "old.ckpt: must hold the whole model; it lacks backend.node_heads.energy/x, backend.edge"
    )
    assert outcome.errors.startswith(f"fastft: {lacks}")


def test_a_checkpoint_is_read_once(
    pet_run: str, fastft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(fastft, "train", pet_run)
    done(fastft, "export", pet_run, "--to", "old.ckpt")
    read = []

    def noted(path: Path) -> PET | None:
        read.append(path)
        return read_model(path)

    monkeypatch.setattr("fastft.adapters.pet.build.read_model", noted)
    settings = ("model.checkpoint=old.ckpt", "model.options.lora={}", "--dry-run")
    done(fastft, "train", pet_run, *settings)
    assert read == [Path("old.ckpt")]


@pytest.mark.parametrize("method", ["full", "heads", "lora"])
def test_fine_tuning(pet_run: str, fastft: Any, method: str) -> None:
    done(fastft, "train", pet_run)
    done(fastft, "export", pet_run, "--to", "old.ckpt")
    tree = {"adapter": "pet", "checkpoint": "old.ckpt", "options": {"stress": True}}
    text = Path(pet_run).read_text()
    start, end = text.index("[model]"), text.index("[data]")
    Path("tune.toml").write_text(text[:start] + tomli_w.dumps({"model": tree}) + "\n" + text[end:])
    done(fastft, "train", "tune.toml", "run.folder=tuned", f"finetune.method={method}")
    done(fastft, "evaluate", "tune.toml", "run.folder=tuned", f"finetune.method={method}")
    done(
        *(fastft, "export", "tune.toml", "--to", "new.ckpt"),
        *("run.folder=tuned", f"finetune.method={method}"),
    )
    old, new = (read_model(Path(name)) for name in ("old.ckpt", "new.ckpt"))
    assert old is not None
    assert new is not None
    before, after = old.state_dict(), new.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    if method == "heads":
        assert all("_heads." in name or "_last_layers." in name for name in changed)
    # Composition and scale are the checkpoint's.
    assert not any("buffer" in name for name in changed)


def test_training_follows_upstreams(pet_run: str, fastft: Any) -> None:
    """Ten steps of Adam on all structures: the losses of upstream's own loop."""
    done(fastft, "train", pet_run)
    done(fastft, "export", pet_run, "--to", "old.ckpt")
    ase.io.write("nine.xyz", ase.io.read("atoms.xyz", ":9"), format="extxyz")
    done(
        *(fastft, "train", pet_run, "run.folder=ten", "run.steps=10", "model.checkpoint=old.ckpt"),
        *("model.options.dtype=float64", "model.options.augment=false", "data.batch_size=9"),
        *("optim.lr=1e-3", "optim.schedule.name=constant", "gradients.clip_norm=1.0"),
    )
    lines = map(json.loads, Path("ten/metrics.jsonl").read_text().splitlines())
    ours = [record["train/loss"] for record in lines if "train/loss" in record]
    model = read_model(Path("old.ckpt"))
    assert model is not None
    upstream = Upstream(model.double(), Path("nine.xyz"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    theirs = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = upstream.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=1e-7)
    assert ours[-1] < ours[0]


def test_a_target_that_moved(pet_run: str, fastft: Any) -> None:
    done(fastft, "train", pet_run)
    done(fastft, "export", pet_run, "--to", "old.ckpt")
    moved = ase.io.read("atoms.xyz", ":")
    assert isinstance(moved, list)
    for atoms in moved:
        atoms.calc.results["energy"] += 100.0 * len(atoms)  # type: ignore[union-attr]
    ase.io.write("atoms.xyz", moved, format="extxyz")
    tree = {"checkpoint": "old.ckpt", "adapter": "pet", "options": {"stress": True}}
    text = Path(pet_run).read_text()
    start, end = text.index("[model]"), text.index("[data]")
    Path("tune.toml").write_text(text[:start] + tomli_w.dumps({"model": tree}) + "\n" + text[end:])
    for fit, shift in (("new", 0.0), ("always", 100.0)):
        settings = (f"run.folder={fit}", f"model.options.fit={fit}")
        done(fastft, "train", "tune.toml", *settings)
        done(fastft, "export", "tune.toml", "--to", f"{fit}.ckpt", *settings)
        old, new = (read_model(Path(name)) for name in ("old.ckpt", f"{fit}.ckpt"))
        assert old is not None
        assert new is not None
        difference = Baseline("energy")(new)[0] - Baseline("energy")(old)[0]
        torch.testing.assert_close(
            difference, torch.full_like(difference, shift), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("step.compile=model", "step.compile: must be 'off' or 'blocks', since the loss runs a"),
        ("step.precision=bf16", "step.precision: must be 'fp32' or 'tf32', since PET is trained"),
        ("loss.terms=[{ name = 'mse' }]", "loss.terms: must be absent, since the pet adapter has"),
    ],
)
def test_what_pet_cannot(
    pet_run: str, fastft: Callable[..., Any], settings: str, said: str
) -> None:
    outcome = fastft("train", pet_run, settings)
    assert outcome.code == 2
    assert outcome.errors.startswith(f"fastft: {said}")
    assert not list(Path("run").glob("checkpoints/*"))


def test_ethanol(ethanol: Path, pet_run: str, fastft: Any) -> None:
    """Real molecules: no finding but a unit that is wrong."""
    file = f"path = '{ethanol}'"
    settings = (
        f"data.train=[{{ {file}, name = 'train', options = {{ frames = ':80' }} }}]",
        f"data.validation=[{{ {file}, name = 'held out', options = {{ frames = '80:' }} }}]",
        *("model.options.stress=false", "data.checks.ignore=[]", "evaluate.metrics=[]"),
    )
    said = done(fastft, "train", pet_run, *settings)
    assert said.count("warning (energy-units)") == said.count("warning (") == 2
    assert "as of kcal/mol" in said
    right = "model.options.unit=kcal/mol"
    said = done(fastft, "train", pet_run, *settings, right, "run.folder=right")
    assert "warning" not in said
    assert "forces_rmse_kcal_mol_per_angstrom" in said


# Run file -> the targets of its export, and what the load report says of them.
EXPORTS = {
    "full": (["energy"], "target 'energy': its composition energies and scale stay"),
    "heads": (["energy", "energy/pbe0"], "targets kept, but not trained: 'energy'"),
    "lora": (["energy/pbe0"], "new target 'energy/pbe0': its heads start as those of 'energy'"),
    "multi-fidelity": (["energy", "energy/pbe0"], "new target 'energy/pbe0'"),
    "new-variant": (["energy/pbe0"], "targets dropped, since no data set holds them: 'energy'"),
}


def test_every_example_is_run() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.toml")} == set(EXPORTS)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("name", EXPORTS)
def test_an_example(name: str, structures: Any, make_adapter: Any, build: Any, fastft: Any) -> None:
    for file, part in (("train", slice(9)), ("validation", slice(9, None))):
        ase.io.write(f"{file}.xyz", structures[part], format="extxyz")
        for atoms in structures[part]:
            atoms.calc.results["energy"] += 7.0 * len(atoms)
        old = "old-validation" if file == "validation" else "old"
        ase.io.write(f"{old}.xyz", structures[part], format="extxyz")
    adapter = make_adapter(stress=True)
    task = build(adapter)
    data = adapter.dataset(DataSource(path=Path("old.xyz")), "train")
    fit_baseline(task.model, "energy", data.samples)
    adapter.save(task, Path("pretrained.ckpt"))
    file = EXAMPLES / f"{name}.toml"
    assert len(file.read_text().splitlines()) <= 40
    smaller = (
        *("run.folder=run", "run.device=cpu", "run.steps=3", "optim.schedule.warmup_steps=1"),
        *("data.workers=0", "data.batch_size=4", "checkpoint.every_steps=3"),
        # Most of the structures have no stress.
        "data.checks.ignore=['missing']",
        # On a CPU it takes minutes.
        "step.compile=off",
    )
    said = done(fastft, "train", str(file), *smaller)
    if name == "heads":
        # Brackets are markup to rich.
        shown = done(fastft, "evaluate", str(file), *smaller)
        assert "forces[energy/pbe0]_mae_mev_per_angstrom" in shown
    targets, note = EXPORTS[name]
    assert note in " ".join(said.replace("\u2502", " ").split())
    if "energy" in targets:
        # Each data set scores its own target; a kept one, too.
        other = "data.validation.0.options.target=energy"
        done(fastft, "evaluate", str(file), *smaller, other)
        scores = json.loads(Path("run/evaluation-validation.json").read_text())["values"]
        assert "forces_mae_mev_per_angstrom" in scores
        assert not any("pbe0" in score for score in scores)
    done(fastft, "export", str(file), "--to", "tuned.ckpt", *smaller)
    model = read_model(Path("tuned.ckpt"))
    assert model is not None
    assert list(model.dataset_info.targets) == targets
    assert not any("lora_" in tensor for tensor in model.state_dict())
