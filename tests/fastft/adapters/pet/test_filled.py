"""Batches that are filled up: few shapes, and the losses and gradients of those that are not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from backpropagated import backpropagated
from captured_steps import record

from fastft.adapters.pet import PetAdapter
from fastft.adapters.pet.baseline import fit_baseline
from fastft.adapters.pet.batch import filled_size
from fastft.blocks import compile_task
from fastft.config import DataSource, GradientsConfig, OptimConfig
from fastft.fused import TORCH_ONLY
from fastft.graphs.forms import StepGraphs
from fastft.graphs.inputs import form_of, same_form
from fastft.graphs.record import make_record_on_gpu
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import Batch, Task

ADAPTIVE = {"num_neighbors_adaptive": 4, "cutoff": 4.0}


def make_batch(adapter: PetAdapter, samples: Sequence[Any], *, fill: bool) -> Batch:
    split = "train" if fill else "validation"
    made = [adapter.transform(sample, split) for sample in samples]
    return Batch(adapter.collate(made), len(made))


def outcome(task: Task, batch: Batch) -> dict[str, torch.Tensor]:
    loss, gradients = backpropagated(task, batch)
    return {"loss": loss.total.detach(), **loss.parts, **gradients}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 1e-12 * value.abs().max().item() + 1e-15
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=atol, msg=name)


@pytest.fixture
def fitted(make_adapter: Any, build: Any, atoms_file: Path) -> Any:
    """An adapter of float64, its task with a fitted baseline, and samples."""

    def make(**options: Any) -> tuple[PetAdapter, Task, list[Any]]:
        options = {"fill_batches": True, **options}
        adapter = make_adapter(dtype="float64", augment=False, **options)
        task = build(adapter)
        data = adapter.dataset(DataSource(path=atoms_file, name="atoms"), "train")
        fit_baseline(task.model, "energy", data.samples)
        return adapter, task, data.samples

    return make


@pytest.mark.parametrize(
    ("atoms", "filled"),
    [(1, 16), (16, 16), (17, 32), (65, 96), (257, 320), (375, 384), (768, 768), (5000, 5120)],
)
def test_sizes_are_few(atoms: int, filled: int) -> None:
    assert filled_size(atoms) == filled


@pytest.mark.parametrize(
    "options",
    [
        {"stress": True},
        {"forces": False},
        {"hypers": ADAPTIVE, "stress": True},
        {"hypers": {**ADAPTIVE, "adaptive_cutoff_method": "solver"}},
    ],
    ids=["stress", "energies", "adaptive", "adaptive, solver"],
)
def test_losses_and_gradients_are_those_without(fitted: Any, options: dict[str, Any]) -> None:
    """Of a whole file, of a part that fills it exactly, and of one atom without neighbours."""
    adapter, task, samples = fitted(**options)
    sizes = [len(sample["structure"]["species"]) for sample in samples]
    exact = [samples[i] for i in exactly(sizes, 16)]
    alone = [samples[sizes.index(1)]]
    for part in (samples, exact, alone):
        plain = make_batch(adapter, part, fill=False)
        filled = make_batch(adapter, part, fill=True)
        assert len(filled["atoms"]) == len(plain["atoms"]) + 1
        assert len(filled["positions"]) % 16 == 0
        assert filled["labels"] == plain["labels"]
        assert_same(outcome(task, filled), outcome(task, plain))


def exactly(sizes: Sequence[int], wanted: int) -> list[int]:
    """Structures with so many atoms in all."""
    found: dict[int, list[int]] = {0: []}
    for index, size in enumerate(sizes):
        found |= {n + size: [*f, index] for n, f in found.items() if n + size not in found}
    return found[wanted]


def test_a_full_batch_has_a_structure_of_no_atoms(fitted: Any) -> None:
    adapter, _, samples = fitted(stress=True)
    sizes = [len(sample["structure"]["species"]) for sample in samples]
    part = [samples[i] for i in exactly(sizes, 16)]
    plain, filled = (make_batch(adapter, part, fill=fill) for fill in (False, True))
    assert torch.equal(filled["system"], plain["system"])
    assert filled["atoms"].tolist() == [*plain["atoms"].tolist(), 1]
    assert torch.equal(filled["cells"][-1], torch.eye(3, dtype=torch.float64))
    assert filled["energy"][-1].isnan()


@pytest.mark.parametrize("hypers", [{}, ADAPTIVE], ids=["fixed", "adaptive"])
def test_batches_of_many_sizes_have_one_form(
    make_adapter: Any, build: Any, tmp_path: Path, hypers: dict[str, Any]
) -> None:
    frames = [make_chain(count) for count in (5, 6, 7, 8)]
    ase.io.write(tmp_path / "chains.xyz", frames, format="extxyz")
    adapter = make_adapter(hypers=hypers, fill_batches=True)
    build(adapter)
    data = adapter.dataset(DataSource(path=tmp_path / "chains.xyz", name="chains"), "train")
    for fill in (True, False):
        # 27 to 30 atoms, 84 to 96 pairs.
        chosen = ([1, 3, 2, 1], [3, 3, 2, 2], [0, 3, 3, 2])
        batches = [make_batch(adapter, [data[i] for i in each], fill=fill) for each in chosen]
        forms = [form_of([batch]) for batch in batches]
        assert all(same_form(form, forms[0]) for form in forms) == fill


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_graphs_of_two_forms_are_replayed(fitted: Any, device: str) -> None:
    """On a CPU, a call that is made again in place of a CUDA graph."""
    place = torch.device(device)
    losses, counts = [], []
    for captured in (False, True):
        adapter, task, samples = fitted()
        task.model.to(place)
        # Molecules, of 8, 20, 11 and 19 atoms.
        parts = ([1, 2, 7, 8], [4, 5, 10, 11], [1, 2, 8, 10], [2, 4, 5, 11])
        chosen = [[samples[i] for i in part] for part in parts]
        batches = [make_batch(adapter, part, fill=True).to(place) for part in chosen]
        step = make_step(task, place)
        said: list[str] = []
        capture = record if device == "cpu" else make_record_on_gpu(place)
        graphs = StepGraphs(step, capture, 100, said.append)
        step.graph = graphs if captured else None
        losses.append(torch.stack([step(i, [b]).loss for i, b in enumerate(batches * 2)]))
        counts.append(graphs.count)
        assert said == []
    assert counts == [0, 2]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=0)


def make_step(task: Task, device: torch.device) -> TrainingStep:
    precision, optim = make_precision("fp32", device), OptimConfig(name="adam", lr=1e-3)
    compile_task(task, "blocks" if device.type == "cuda" else "off", precision)
    optimizer = Optimizer(make_groups(task, optim, {}), optim, 100, TORCH_ONLY)
    return TrainingStep(task, optimizer, None, GradientsConfig(), precision)


def make_chain(count: int) -> ase.Atoms:
    positions = np.zeros((count, 3))
    positions[:, 0] = 1.4 * np.arange(count)
    frame = ase.Atoms("C" * count, positions)
    frame.info["energy"] = -1.0 * count**2
    frame.arrays["forces"] = np.zeros((count, 3))
    return frame


@pytest.mark.parametrize(
    ("split", "options", "count"),
    [("train", {}, 3), ("validation", {}, 2), ("train", {"fill_batches": False}, 2)],
)
def test_training_batches_are_filled_and_no_others(
    fitted: Any, split: Any, options: dict[str, Any], count: int
) -> None:
    adapter, _, samples = fitted(**options)
    batch = adapter.collate([adapter.transform(sample, split) for sample in samples[:2]])
    assert len(batch["atoms"]) == count


def test_a_run_is_the_one_without(fastft: Any, pet_run: str) -> None:
    """Its losses and its scores."""
    lines = {}
    for folder, fill in (("filled", "true"), ("plain", "false")):
        settings = (f"run.folder={folder}", f"model.options.fill_batches={fill}")
        assert fastft("train", pet_run, *settings, "model.options.dtype=float64").code == 0
        lines[folder] = Path(folder, "metrics.jsonl").read_text().splitlines()
    values = [[numbers(line) for line in each] for each in lines.values()]
    for ours, theirs in zip(*values, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name


def numbers(line: str) -> dict[str, float]:
    """What a line of the log says of losses and scores."""
    kinds = ("train", "gradients", "validation")
    return {n: value for n, value in json.loads(line).items() if n.split("/")[0] in kinds}
