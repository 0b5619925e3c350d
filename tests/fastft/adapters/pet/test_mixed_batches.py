"""Structures of several targets in one batch: each is predicted and scored by its own."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from metatrain.utils.data import DatasetInfo
from metatrain.utils.data.target_info import get_energy_target_info

from fastft.adapters.pet.baseline import fit_baseline
from fastft.adapters.pet.loss import PetLoss
from fastft.config import DataSource
from fastft.loop import score
from fastft.precision import make_precision
from fastft.task import Batch, Task

TARGETS = ("energy", "energy/new")


@pytest.fixture
def mixed(make_adapter: Any, build: Any, atoms_file: Path) -> tuple[Any, Any, list[Any]]:
    """An adapter, a model of two targets, and samples that belong to them in turn."""
    adapter = make_adapter(dtype="float64", stress=True)
    model = build(adapter).model
    info = get_energy_target_info(TARGETS[1], {"unit": "eV"}, True, True)  # type: ignore[arg-type]
    model.restart(DatasetInfo("angstrom", model.atomic_types, {TARGETS[1]: info}))
    model.to(torch.float64)
    data = adapter.dataset(DataSource(path=atoms_file, name="atoms"), "train")
    samples = [{**sample, "target": i % 2} for i, sample in enumerate(data.samples)]
    moved = [{**sample, "energy": 3 * sample["energy"] + 7} for sample in samples]
    for target, labelled in zip(TARGETS, (samples, moved), strict=True):
        fit_baseline(model, target, labelled)
    return adapter, model, samples


def test_losses_of_targets_add_up(mixed: Any) -> None:
    adapter, model, samples = mixed
    weights = {"energy": 2.0, "forces": 0.5, "stress": 3.0}
    options = replace(adapter.options, loss=replace(adapter.options.loss, **weights))
    loss = PetLoss(options, TARGETS)(model, make_batch(adapter, samples))
    together = gradients(loss.total, model)
    apart: dict[str, torch.Tensor] = {}
    total = 0.0
    for index, name in enumerate(TARGETS):
        own = [{**s, "target": 0} for s in samples if s["target"] == index]
        batch = make_batch(adapter, own)
        alone = PetLoss(options, [name])(model, batch)
        total += alone.total.item()
        for part, value in alone.parts.items():
            torch.testing.assert_close(loss.parts[f"{name}:{part}"], value)
        for part, predicted in alone.predictions.items():
            chosen = of_target(index, part, make_batch(adapter, samples))
            torch.testing.assert_close(loss.predictions[part][chosen], predicted, equal_nan=True)
        for parameter, gradient in gradients(alone.total, model).items():
            apart[parameter] = apart.get(parameter, 0) + gradient
    assert loss.total.item() == pytest.approx(total)
    assert list(loss.parts)[:2] == ["energy:energy", "energy:forces"]
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mixed_in_training", [True, False])
def test_evaluation_adds_up_what_training_does(mixed: Any, mixed_in_training: bool) -> None:
    """Its batches hold structures of one data set."""
    adapter, model, samples = mixed
    # More of one than of the other.
    samples = samples[:9]
    loss = PetLoss(adapter.options, TARGETS, mixed=mixed_in_training)
    whole = loss(model, make_batch(adapter, samples))
    apart = [make_batch(adapter, [s for s in samples if s["target"] == i]) for i in (0, 1)]
    loader: Any = SimpleNamespace(batches=lambda: apart)
    found = score(Task(model, loss), loader, {}, make_precision("fp32", torch.device("cpu")))
    if mixed_in_training:
        expected = whole.total.item()
    else:
        losses = [loss(model, batch).total.item() for batch in apart]
        expected = (5 * losses[0] + 4 * losses[1]) / 9
    assert found["loss"] == pytest.approx(expected)


def test_a_target_without_structures(mixed: Any) -> None:
    adapter, model, samples = mixed
    batch = make_batch(adapter, [{**s, "target": 0} for s in samples])
    loss = PetLoss(adapter.options, TARGETS)(model, batch)
    # Zeros would pass for errors of it, in the logs.
    assert list(loss.parts) == ["energy:energy", "energy:forces", "energy:stress"]
    for name, gradient in gradients(loss.total, model).items():
        assert torch.isfinite(gradient).all()
        assert TARGETS[1] not in name or not gradient.any()


def test_structures_without_labels(mixed: Any) -> None:
    adapter, model, samples = mixed
    without = [{n: v for n, v in s.items() if n != "forces" or s["target"]} for s in samples]
    loss = PetLoss(adapter.options, TARGETS)(model, make_batch(adapter, without))
    assert set(loss.parts) == {
        *("energy:energy", "energy:stress"),
        *("energy/new:energy", "energy/new:forces", "energy/new:stress"),
    }
    bare = [{name: s[name] for name in ("structure", "target")} for s in samples]
    loss = PetLoss(adapter.options, TARGETS)(model, make_batch(adapter, bare))
    assert (loss.total.item(), loss.parts) == (0, {})
    assert not any(gradient.any() for gradient in gradients(loss.total, model).values())


@pytest.mark.parametrize("only", [None, 1])
def test_filled_batches_have_the_same_losses(mixed: Any, only: int | None) -> None:
    """Of both targets, and where what fills them is no structure's target but the first."""
    adapter, model, samples = mixed
    samples = [s for s in samples if only in (None, s["target"])]
    found = []
    for split in ("train", "validation"):
        batch = make_batch(adapter, samples, split)
        loss = PetLoss(adapter.options, TARGETS)(model, batch)
        found.append({**loss.parts, "total": loss.total.detach(), **gradients(loss.total, model)})
    filled, plain = found
    assert filled.keys() == plain.keys()
    for name, value in plain.items():
        atol = 1e-12 * value.abs().max().item() + 1e-15
        torch.testing.assert_close(filled[name], value, rtol=1e-12, atol=atol, msg=name)


def make_batch(adapter: Any, samples: list[Any], split: str = "validation") -> Batch:
    """Filled, for the split 'train'; nothing is turned."""
    made = [{**adapter.transform(s, "validation"), "split": split} for s in samples]
    return Batch(adapter.collate(made), len(made))


def of_target(index: int, part: str, batch: Batch) -> torch.Tensor:
    chosen = batch["target"] == index
    return chosen[batch["system"]] if part == "forces" else chosen


def gradients(total: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
