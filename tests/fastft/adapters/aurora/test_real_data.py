"""A small Aurora on real ERA5: a new variable learnt, a run that goes on, and back to upstream."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tomli_w
import torch
import xarray as xr
from aurora import normalisation
from aurora.rollout import rollout
from upstream_aurora import upstream_batch, upstream_model

from fastft.adapters.registry import find_adapter, optim_preset
from fastft.names import load_state_dict
from fastft.runfile import read_run_file
from fastft.task import Batch

LEVELS = (500, 850)


@pytest.fixture
def run_file(norway: Path, make_adapter: Any, build: Any, project: Path) -> Path:
    """A run from a small pretrained checkpoint; 'ws', the wind's speed, is new."""
    pretrained = make_adapter(model_class="AuroraSmallPretrained")
    torch.save(build(pretrained).model.state_dict(), "small.ckpt")
    surface = xr.open_dataset(norway / "norway_surface.nc").load()
    surface["ws"] = np.hypot(surface["u10"], surface["v10"])
    Path("era5").mkdir()
    surface[["t2m", "u10", "v10", "msl", "ws"]].to_netcdf("era5/surface.nc")
    synthetic_levels(surface).to_netcdf("era5/levels.nc")
    static = str(norway / "norway_static.nc")
    train = {"path": "era5", "options": {"static": static, "end": "2025-06-06"}}
    later = {"path": "era5", "options": {"static": static, "start": "2025-06-05T12:00"}}
    tree = {
        "run": {"folder": "run", "steps": 12, "device": "cpu"},
        "model": {
            "adapter": "aurora",
            "checkpoint": "small.ckpt",
            "options": {
                "model_class": "AuroraSmallPretrained",
                "levels": list(LEVELS),
                "surf_vars": {"ws": {}},
                "arguments": dict(pretrained.options.arguments),
            },
        },
        "finetune": {
            "new_heads": {
                "encoder.surf_token_embeds.weights.ws": {"init": "zero"},
                "decoder.surf_heads.ws": {"init": "zero"},
            }
        },
        "data": {"batch_size": 2, "workers": 1, "train": [train], "validation": [later]},
        "optim": {
            "preset": "guide",
            "lr": 1e-2,
            "groups": [{"match": ["*.ws", "*.ws.*"], "lr": 5e-2}],
            "schedule": {"name": "constant"},
        },
        "checkpoint": {"every_steps": 6},
        "evaluate": {"every_steps": 6},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    Path("run.toml").write_text(tomli_w.dumps(tree))
    return Path("run.toml")


def synthetic_levels(surface: xr.Dataset) -> xr.Dataset:
    """Waves within a deviation of aurora's statistics, since the sample has no levels."""
    steps = np.arange(surface.sizes["valid_time"])[:, None, None]
    rows = np.arange(surface.sizes["latitude"])[:, None] / 10
    columns = np.arange(surface.sizes["longitude"]) / 15
    fields = {}
    for number, name in enumerate(("z", "u", "v", "t", "q")):
        wave = np.sin(steps / 4 + rows + columns + number)
        levels = [
            normalisation.locations[f"{name}_{level}"]
            + 0.5 * normalisation.scales[f"{name}_{level}"] * wave
            for level in LEVELS
        ]
        axes = ("valid_time", "pressure_level", "latitude", "longitude")
        fields[name] = (axes, np.stack(levels, 1).astype(np.float32))
    places = {name: surface[name] for name in ("valid_time", "latitude", "longitude")}
    return xr.Dataset(fields, {**places, "pressure_level": list(LEVELS)})


def test_from_statistics_to_upstream(run_file: Path, fastft: Callable[..., Any]) -> None:
    def done(*command: str) -> Any:
        outcome = fastft(*command)
        assert (outcome.errors, outcome.code) == ("", 0)
        return outcome.output

    tree = tomllib.loads(run_file.read_text())
    found = tomllib.loads(done("stats", "run.toml"))["model"]["options"]["surf_vars"]
    assert set(found) == {"ws"}
    tree["model"]["options"]["surf_vars"] = found
    run_file.write_text(tomli_w.dumps(tree))

    # Nothing is wrong with the data, all that the checkpoint has is loaded, and the loss falls.
    said = done("train", "run.toml")
    assert "warning (" not in said
    assert "100.00% of the values outside new heads" in said
    losses = {
        record["step"]: record
        for line in Path("run/metrics.jsonl").read_text().splitlines()
        if "train/loss" in (record := json.loads(line))
    }
    assert losses[12]["train/loss"] < 0.8 * losses[1]["train/loss"]
    assert losses[12]["train/ws"] < 0.8 * losses[1]["train/ws"]

    # Interrupted half-way, it ends at the same bits.
    done("train", "run.toml", "run.folder=halves", "run.steps=6")
    done("train", "run.toml", "run.folder=halves", "--resume")
    ends = [Path(folder, "checkpoints", "step-00000012") for folder in ("run", "halves")]
    weights = [(end / "model.safetensors").read_bytes() for end in ends]
    assert weights[0] == weights[1]
    moments = [torch.load(end / "training.pt", weights_only=True)["optimizer"] for end in ends]
    assert moments[0].keys() == moments[1].keys()
    for name, state in moments[0].items():
        assert all(torch.equal(value, moments[1][name][key]) for key, value in state.items()), name

    # Upstream alone, from the exported files, predicts the same bits over three steps.
    done("export", "run.toml", "--to", "tuned.ckpt", "--checkpoint", "latest")
    samples, ours = predicted(run_file, ends[0] / "model.safetensors")
    theirs = upstream_model(json.loads(Path("tuned.ckpt.json").read_text()))
    theirs.load_checkpoint_local("tuned.ckpt", strict=True)
    theirs.eval()
    with torch.inference_mode():
        steps = list(rollout(theirs, upstream_batch(samples), 3))
    for kind in ("surf_vars", "atmos_vars"):
        for name in getattr(steps[0], kind):
            expected = torch.cat([getattr(step, kind)[name] for step in steps], 1)
            assert torch.equal(ours[name], expected), name
    assert set(ours) == {"2t", "10u", "10v", "msl", "ws", "z", "u", "v", "t", "q"}


def predicted(run_file: Path, weights: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Two samples, and what an evaluation predicts from them with a checkpoint's weights."""
    config = read_run_file(run_file, ["model.options.rollout_steps=3"], optim_preset)
    adapter = find_adapter(config.model)
    data = adapter.dataset(config.data.validation[0], "validation")
    samples = [data[0], data[2]]
    cpu = torch.device("cpu")
    task = adapter.build(None, device=cpu, checkpoint=None, pretrained=False)
    load_state_dict(task.model, safetensors.torch.load_file(weights), where=weights)
    task.model.eval()
    with torch.no_grad():
        loss = task.loss(task.model, Batch(adapter.collate(samples), len(samples)))
    return samples, loss.predictions
