"""Variables that are NaN in places: what counts in the loss, and what the model gets."""

from typing import Any

import numpy as np
import pytest
import torch

from fastft.errors import ConfigError
from fastft.task import Batch

NAMES = ("2t", "q")


@pytest.fixture
def masked_samples(make_samples: Any) -> Any:
    """Samples whose 2t is NaN over land, and whose q is below the ground, more so at 850 hPa."""

    def make(adapter: Any) -> list[Any]:
        samples = make_samples(adapter)
        random = np.random.default_rng(3)
        land = random.random((16, 32)) < 0.3
        ground = random.random((2, 16, 32)) < np.array([0.1, 0.6])[:, None, None]
        for sample in samples:
            for prefix in ("", "target_"):
                sample[f"{prefix}surf"]["2t"][:, land] = np.nan
                sample[f"{prefix}atmos"]["q"][:, ground] = np.nan
        return samples

    return make


def loss_of(adapter: Any, task: Any, samples: list[Any]) -> Any:
    return task.loss(task.model, Batch(adapter.collate(samples), len(samples)))


@pytest.mark.parametrize("rollout_steps", [1, 2])
def test_means_are_over_the_points_that_have_targets(
    rollout_steps: int, make_adapter: Any, build: Any, masked_samples: Any
) -> None:
    adapter = make_adapter(masked=list(NAMES), rollout_steps=rollout_steps)
    task, samples = build(adapter), masked_samples(adapter)
    with torch.no_grad():
        loss = loss_of(adapter, task, samples)
    variables = adapter.variables
    for name in (*variables.surf, *variables.atmos):
        kind = "surf" if name in variables.surf else "atmos"
        target = np.stack([sample[f"target_{kind}"][name] for sample in samples])
        scale = np.array(1.0)
        if kind == "surf":
            scale = np.array(variables.statistics[name].scale)
        else:
            levels = variables.levels[name]
            scale = np.array([levels[str(level)].scale for level in (500, 850)])[:, None, None]
        error = np.abs(loss.predictions[name].numpy().astype(np.float64) - target) / scale
        expected = np.mean([np.nanmean(error[:, step]) for step in range(rollout_steps)])
        assert loss.parts[name].item() == pytest.approx(expected, rel=1e-4)


def test_gradients_ignore_what_is_missing(
    make_adapter: Any, build: Any, masked_samples: Any
) -> None:
    adapter = make_adapter(masked=list(NAMES))
    task, samples = build(adapter), masked_samples(adapter)
    loss_of(adapter, task, samples).total.backward()
    head = task.model.decoder.surf_heads["2t"].weight
    assert all(p.grad.isfinite().all() for p in task.model.parameters())
    assert head.grad.norm() > 0

    # Nothing of 2t is there: it adds nothing, and pulls its head nowhere.
    task.model.zero_grad()
    for sample in samples:
        sample["target_surf"]["2t"][:] = np.nan
    loss = loss_of(adapter, task, samples)
    loss.total.backward()
    assert loss.parts["2t"] == 0
    assert head.grad.norm() == 0
    assert all(p.grad.isfinite().all() for p in task.model.parameters())


def test_inputs_are_filled_with_the_location(
    make_adapter: Any, build: Any, masked_samples: Any
) -> None:
    adapter = make_adapter(masked=list(NAMES))
    samples = masked_samples(adapter)
    batch = adapter.collate(samples)
    missing = np.isnan(np.stack([sample["atmos"]["q"] for sample in samples]))
    for c, level in enumerate(("500", "850")):
        location = np.float32(adapter.variables.levels["q"][level].location)
        filled = batch["atmos"]["q"][:, :, c].numpy()
        assert (filled[missing[:, :, c]] == location).all()
        assert np.isin(filled[~missing[:, :, c]], location).sum() == 0
    assert batch["q"].isnan().any()

    # A prediction that is NaN is never taken for a target that is missing.
    task = build(adapter)
    with torch.no_grad():
        task.model.decoder.surf_heads["2t"].bias[0] = torch.nan
        assert loss_of(adapter, task, samples).total.isnan()


def test_names(make_adapter: Any) -> None:
    with pytest.raises(ConfigError) as error:
        make_adapter(masked=["2tt", "lsm"])
    assert error.value.problems == (
        "model.options.masked: '2tt' must be a predicted variable; it is none; did you mean '2t'?",
        "model.options.masked: 'lsm' must be a predicted variable; it is none; choose from '2t',"
        " '10u', '10v', 'msl', 'z', 'u', 'v', 't', 'q'",
    )
