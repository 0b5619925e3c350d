"""A tiny Aurora, and weather that nobody measured."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from aurora import normalisation
from torch import nn
from weather_files import make_data, write

from fastft.adapters.aurora import AuroraAdapter, AuroraOptions
from fastft.runfile import parse
from fastft.task import Sample, Task

# Ten thousand parameters; the backbone has two depths, with shifted windows in the first.
TINY = {
    "embed_dim": 16,
    "num_heads": 2,
    "encoder_depths": [2, 1],
    "encoder_num_heads": [2, 4],
    "decoder_depths": [1, 2],
    "decoder_num_heads": [4, 2],
    "window_size": [2, 2, 2],
}
LEVELS = (500, 850)


@pytest.fixture(autouse=True)
def own_statistics() -> Iterator[None]:
    """aurora's dicts of statistics, put back after each test."""
    kept = dict(normalisation.locations), dict(normalisation.scales)
    yield
    for present, old in zip((normalisation.locations, normalisation.scales), kept, strict=True):
        present.clear()
        present.update(old)


@pytest.fixture
def make_adapter() -> Callable[..., AuroraAdapter]:
    """An adapter of the tiny model."""

    def make(**options: Any) -> AuroraAdapter:
        options["arguments"] = {**TINY, **options.pop("arguments", {})}
        tree = {"levels": list(LEVELS), **options}
        return AuroraAdapter(parse(AuroraOptions, tree, key="model.options"))

    return make


@pytest.fixture
def build() -> Callable[[AuroraAdapter], Task]:
    """The adapter's task on the CPU, its blocks no longer the identity."""

    def make(adapter: AuroraAdapter) -> Task:
        torch.manual_seed(0)
        cpu = torch.device("cpu")
        task = adapter.build(None, device=cpu, checkpoint=None, pretrained=False)
        wake(task.model)
        return task

    return make


@pytest.fixture
def make_samples() -> Callable[..., list[Sample]]:
    """Samples of an adapter's variables: draws one deviation above their statistics."""

    def make(adapter: AuroraAdapter, count: int = 2, **settings: Any) -> list[Sample]:
        return [synthetic(adapter, np.random.default_rng(i), i, **settings) for i in range(count)]

    return make


@pytest.fixture
def weather_run(project: Path, make_adapter: Any) -> str:
    """A run file of two steps over a small netCDF file, in the current folder."""
    data = make_data()
    for name, location, scale in (("t2m", 280, 10), ("msl", 1e5, 1e3), ("t", 260, 10)):
        data[name] = location + scale * data[name]
    data["z"] = (("time", "level", "latitude", "longitude"), data["z"].values * 1e3 + 3e4)
    data["z"][:, 0] += 2e4
    data["lsm"] = (data["lsm"] > 0).astype(np.float32)
    write(project, data)
    source = {"path": "era5.nc", "options": {"rename": {"static.z": "zs"}}}
    later = {"path": "era5.nc", "options": {**source["options"], "start": "2020-01-02"}}
    tree = {
        "run": {"folder": "run", "steps": 2, "device": "cpu"},
        "model": {
            "adapter": "aurora",
            "options": {
                "levels": list(LEVELS),
                "surf_vars": ["2t", "msl"],
                "static_vars": ["lsm", "z"],
                "atmos_vars": ["t", "z"],
                "rollout_steps": 2,
                "arguments": dict(make_adapter().options.arguments),
            },
        },
        "data": {
            "train": [source],
            "validation": [later],
            "batch_size": 2,
            "checks": {"ignore": ["leakage"]},
        },
        "optim": {"lr": 0.001},
        "evaluate": {"metrics": [{"name": "rmse", "prediction": "2t", "target": "2t"}]},
    }
    Path("weather.toml").write_text(tomli_w.dumps(tree))
    return "weather.toml"


@pytest.fixture
def norway() -> Path:
    """The folder with a week of ERA5 over Norway: its surface, and static fields."""
    folder = os.environ.get("FASTFT_DATA")
    if not folder or not (path := Path(folder) / "weather").is_dir():
        pytest.skip("needs the real ERA5 sample: FASTFT_DATA is not set, or has no weather")
    return path


def wake(model: nn.Module) -> None:
    """Random modulation: at its initialisation, zero, every Swin block is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_modulation" in name:
                parameter.normal_(std=0.05, generator=generator)


def synthetic(
    adapter: AuroraAdapter,
    random: np.random.Generator,
    index: int,
    grid: tuple[int, int] = (16, 32),
    levels: Sequence[int] = LEVELS,
) -> Sample:
    variables, (height, width) = adapter.variables, grid

    # One deviation above the location, so that there is something to learn.
    def surface(count: int, name: str) -> np.ndarray:
        location, scale = variables.statistics[name]
        noise = 1 + random.normal(size=(count, *grid))
        return (location + scale * noise).astype(np.float32)

    def upper(count: int, name: str) -> np.ndarray:
        pairs = np.array([variables.levels[name][str(level)] for level in levels])
        location, scale = pairs.T[:, :, None, None]
        noise = 1 + random.normal(size=(count, len(levels), *grid))
        return (location + scale * noise).astype(np.float32)

    steps = adapter.options.rollout_steps
    fixed = np.random.default_rng(99)
    static = {n: fixed.normal(size=grid).astype(np.float32) for n in variables.static}
    return {
        "surf": {name: surface(2, name) for name in variables.surf},
        "atmos": {name: upper(2, name) for name in variables.atmos},
        "static": static,
        "target_surf": {name: surface(steps, name) for name in variables.surf},
        "target_atmos": {name: upper(steps, name) for name in variables.atmos},
        "time": np.int64(1_590_969_600 + 6 * 3600 * index),
        "lat": np.linspace(80, -80, height, dtype=np.float32),
        "lon": np.linspace(0, 360, width, endpoint=False, dtype=np.float32),
        "levels": list(levels),
    }
