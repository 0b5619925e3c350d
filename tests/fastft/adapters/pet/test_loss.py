"""Energies, forces, stress and their errors: upstream's own, in any precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from metatrain.pet import PET
from upstream_pet import Upstream
from waits import Waits

from fastft.adapters.pet import PetAdapter
from fastft.adapters.pet.baseline import Baseline
from fastft.adapters.pet.loss import PetLoss
from fastft.config import DataSource
from fastft.errors import ConfigError
from fastft.task import Batch, Task


@pytest.fixture
def fitted(make_adapter: Any, build: Any, atoms_file: Path) -> Callable[..., Any]:
    """An adapter, its task with a fitted baseline, and a batch of the whole file."""

    def make(**options: Any) -> tuple[PetAdapter, Task, Batch]:
        adapter = make_adapter(**options)
        task = build(adapter)
        data = adapter.dataset(DataSource(path=atoms_file, name="atoms"), "train")
        fit(adapter, task, data)
        return adapter, task, batch_of(adapter, data)

    return make


def fit(adapter: PetAdapter, task: Task, data: Any) -> None:
    from fastft.adapters.pet.baseline import fit_baseline

    fit_baseline(task.model, adapter.options.target, data.samples)  # type: ignore[arg-type]


def batch_of(adapter: PetAdapter, data: Any) -> Batch:
    samples = [adapter.transform(data[i], "validation") for i in range(len(data))]
    return Batch(adapter.collate(samples), len(samples))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "hypers"),
    [
        ("float64", 1e-9, {}),
        ("float32", 2e-4, {}),
        ("float64", 1e-9, {"num_neighbors_adaptive": 4, "cutoff": 4.0}),
        ("float64", 1e-9, {"cutoff_function": "Cosine", "featurizer_type": "residual"}),
    ],
)
def test_upstream_has_the_same_loss_and_gradients(
    fitted: Any, atoms_file: Path, dtype: str, tolerance: float, hypers: dict[str, Any]
) -> None:
    _, task, batch = fitted(dtype=dtype, stress=True, hypers=hypers)
    loss = task.loss(task.model, batch)
    loss.total.backward()
    ours = gradients(task)
    synchronise(task.model)
    theirs = Upstream(task.model, atoms_file).loss()
    task.model.zero_grad()
    theirs.backward()
    assert loss.total.item() == pytest.approx(theirs.item(), rel=tolerance)
    assert loss.total.item() == pytest.approx(sum(p.item() for p in loss.parts.values()))
    upstream = gradients(task)
    assert ours.keys() == upstream.keys()
    largest = max(g.abs().max() for g in upstream.values())
    for name, gradient in ours.items():
        assert (gradient - upstream[name]).abs().max() <= tolerance * largest, name


def test_baseline_is_upstreams(
    fitted: Any, build: Any, make_adapter: Any, atoms_file: Path
) -> None:
    _, task, _ = fitted()
    theirs = build(make_adapter())
    Upstream(theirs.model, atoms_file, stress=False).fit()
    for ours, expected in zip(
        Baseline("energy")(task.model), Baseline("energy")(theirs.model), strict=True
    ):
        # Sums over atoms in another order.
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)


def test_baseline_follows_its_buffers(fitted: Any, make_adapter: Any, build: Any) -> None:
    """In the memory that a CUDA graph may read."""
    _, task, batch = fitted()
    assert isinstance(task.model, PET)
    assert isinstance(task.loss, PetLoss)
    (baseline,) = task.loss._baselines
    with torch.no_grad():
        before = task.loss(task.model, batch).predictions["energy"]
        places = [values.data_ptr() for values in baseline(task.model)]
        fresh = build(make_adapter()).model.state_dict()
        for name, buffer in task.model.named_buffers():
            buffer.copy_(fresh[name])
        after = task.loss(task.model, batch).predictions["energy"]
    assert (before - after).abs().max() > 100
    assert [values.data_ptr() for values in baseline(task.model)] == places
    for ours, expected in zip(baseline(task.model), Baseline("energy")(task.model), strict=True):
        assert torch.equal(ours, expected)


def test_evaluation_is_as_training(fitted: Any) -> None:
    _, task, batch = fitted(dtype="float64", stress=True)
    training = task.loss(task.model, batch)
    task.model.eval()
    with torch.no_grad():
        evaluated = task.loss(task.model, batch)
    assert not evaluated.total.requires_grad
    torch.testing.assert_close(evaluated.total, training.total.detach())
    for name, predicted in evaluated.predictions.items():
        assert not predicted.requires_grad
        torch.testing.assert_close(predicted, training.predictions[name], equal_nan=True)


def test_forces_and_stress_are_derivatives(
    fitted: Any, structures: list[ase.Atoms], tmp_path: Path
) -> None:
    adapter, task, _ = fitted(dtype="float64", stress=True)
    task.model.eval()
    atoms = structures[9].copy()

    def predict(moved: ase.Atoms) -> dict[str, torch.Tensor]:
        path = tmp_path / "one.xyz"
        moved.info, moved.calc = {"energy": 0.0, "stress": np.zeros(9)}, None
        moved.arrays["forces"] = np.zeros((len(moved), 3))
        ase.io.write(path, moved, format="extxyz")
        batch = batch_of(adapter, adapter.dataset(DataSource(path=path), "test"))
        # Text has eight decimals.
        batch.data["positions"].copy_(torch.from_numpy(moved.positions))
        batch.data["cells"][0].copy_(torch.from_numpy(moved.cell.array))
        with torch.no_grad():
            return task.loss(task.model, batch).predictions

    step = 1e-5
    found = predict(atoms)
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[1, 2] += sign * step
        energies.append(predict(moved)["energy"].item())
    force = -(energies[0] - energies[1]) / (2 * step)
    assert found["forces"][1, 2].item() == pytest.approx(force, rel=1e-4, abs=1e-6)
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        strain = np.eye(3)
        strain[0, 1] += sign * step
        moved.set_cell(moved.cell.array @ strain, scale_atoms=True)
        energies.append(predict(moved)["energy"].item())
    stress = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
    assert found["stress"][0, 0, 1].item() == pytest.approx(stress, rel=1e-4, abs=1e-7)


def test_absent_labels_do_not_count(fitted: Any) -> None:
    _, task, batch = fitted(stress=True)
    whole = task.loss(task.model, batch)
    batch.data["forces"][:] = torch.nan
    batch.data["energy"][1:] = torch.nan
    partial = task.loss(task.model, batch)
    assert partial.parts["forces"] == 0
    assert partial.parts["stress"] == whole.parts["stress"]
    partial.total.backward()
    assert all(torch.isfinite(g).all() for g in gradients(task).values())


@pytest.mark.parametrize("kind", ["mae", "huber"])
def test_weights_and_kinds(fitted: Any, kind: str) -> None:
    weights = {"energy": 2.0, "forces": 0.5, "stress": 0.0}
    _, task, batch = fitted(stress=True, loss={"kind": kind, "delta": 0.1, **weights})
    loss = task.loss(task.model, batch)
    total = sum(weights[name] * part.item() for name, part in loss.parts.items())
    assert loss.total.item() == pytest.approx(total)
    assert loss.parts["stress"] > 0


def test_energies_alone(fitted: Any) -> None:
    _, task, batch = fitted(forces=False)
    assert not task.double_backward
    loss = task.loss(task.model, batch)
    loss.total.backward()
    assert set(loss.parts) == set(loss.predictions) == {"energy"}


def test_a_frozen_body_is_differentiated_too(fitted: Any) -> None:
    _, task, batch = fitted()
    task.model.eval()
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(any(name.startswith(head) for head in task.heads))
    task.loss(task.model, batch).total.backward()
    assert not task.model.backend.training  # type: ignore[union-attr]
    assert {n.split(".")[1] for n in gradients(task)} == {h.split(".")[1] for h in task.heads}


def test_nothing_waits_for_the_device(fitted: Any) -> None:
    _, task, batch = fitted(stress=True)
    # The baseline is read once.
    task.loss(task.model, batch)
    with Waits() as waits:
        task.loss(task.model, batch).total.backward()
    assert waits.found == []


@pytest.mark.gpu
def test_a_gpu_computes_the_same_and_waits_for_nothing(fitted: Any) -> None:
    _, task, batch = fitted(dtype="float64", stress=True)
    here = task.loss(task.model, batch)
    here.total.backward()
    expected = gradients(task)
    task.model.zero_grad()
    device = torch.device("cuda")
    task.model.to(device)
    batch = batch.to(device)
    # Libraries start, and the baseline is read once.
    task.loss(task.model, batch).total.backward()
    task.model.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = task.loss(task.model, batch)
        there.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.total.item() == pytest.approx(here.total.item(), rel=1e-9)
    for name, gradient in gradients(task).items():
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-7, atol=1e-8)


def test_autocast_is_refused(fitted: Any) -> None:
    _, task, batch = fitted()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ConfigError, match=r"step\.precision: must be 'fp32' or 'tf32'"),
    ):
        task.loss(task.model, batch)


def gradients(task: Task) -> dict[str, torch.Tensor]:
    found = task.model.named_parameters()
    return {name: p.grad.clone() for name, p in found if p.grad is not None}


def synchronise(model: Any) -> None:
    """Upstream's own forward reads copies of the buffers."""
    model.additive_models[0].sync_tensor_maps()
    model.scaler.sync_tensor_maps()
