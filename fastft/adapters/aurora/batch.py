"""Samples as batches, and batches as Aurora's own.

A batch is a plain nested dict, which the core can pin and move: `surf` and `atmos` with leading B,
`static`, `lat`, `lon` once, and each target under the name of its variable, `[B, R, H, W]` or
`[B, R, C, H, W]`, where metrics find it. Times and levels stay on the host.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import aurora
import torch
from torch import Tensor

from fastft.adapters.aurora.forward import CheckedMetadata, DeviceBatch
from fastft.adapters.aurora.variants import Weather
from fastft.errors import DataError, nearest
from fastft.task import Sample


def collate(
    samples: Sequence[Sample],
    variant: Weather,
    *,
    levels: Sequence[int],
    steps: int,
    patch_size: int,
) -> dict[str, Any]:
    """One batch of samples on one grid, the last row cut off where upstream would cut it off.

    Args:
        samples: with the fields that `fastft.adapters.aurora.data` gives.
        variant: of the run's class, with its variables.
        levels: in hPa, of every sample.
        steps: R, the targets of every sample.
        patch_size: the model's.

    Raises:
        DataError: with every problem: variables, levels or shapes that are not the model's, grids
            or static fields that differ between samples.
    """
    variables = variant.variables
    kinds = {"surf": variant.inputs, "atmos": variables.atmos}
    kinds |= {"target_surf": variant.targets, "target_atmos": variables.atmos}
    problems = list(_grid_problems(samples, patch_size, variables.static))
    every = {**kinds, "static": variables.static}
    for sample in samples:
        problems += _sample_problems(sample, every, levels, steps)
    if problems:
        raise DataError(dict.fromkeys(problems))
    first = samples[0]
    rows = len(first["lat"]) // patch_size * patch_size

    def stacked(kind: str) -> dict[str, Tensor]:
        return {
            name: torch.stack([_tensor(sample[kind][name])[..., :rows, :] for sample in samples])
            for name in kinds[kind]
        }

    history = {kind: stacked(kind) for kind in ("surf", "atmos")}
    for fields in history.values():
        for name in set(fields) & variant.masked:
            location = torch.tensor(variables.location(name, levels))
            fields[name] = torch.where(fields[name].isnan(), location, fields[name])
    return {
        **history,
        "static": {name: _tensor(first["static"][name])[:rows] for name in variables.static},
        "lat": _tensor(first["lat"])[:rows],
        "lon": _tensor(first["lon"]),
        "time": tuple(int(sample["time"]) for sample in samples),
        "levels": tuple(levels),
        **stacked("target_surf"),
        **stacked("target_atmos"),
    }


def first_state(data: Mapping[str, Any], rollout_step: int = 0) -> DeviceBatch:
    """What the model starts from; `rollout_step`: after so many of its own steps."""
    return DeviceBatch(
        surf_vars=dict(data["surf"]),
        static_vars=dict(data["static"]),
        atmos_vars=dict(data["atmos"]),
        metadata=CheckedMetadata(
            lat=data["lat"],
            lon=data["lon"],
            # With a zone: the model embeds the timestamp, which else depends on the machine's zone.
            time=tuple(datetime.fromtimestamp(seconds, UTC) for seconds in data["time"]),
            atmos_levels=data["levels"],
            rollout_step=rollout_step,
        ),
    )


def _grid_problems(
    samples: Sequence[Sample], patch_size: int, static: Sequence[str]
) -> Iterator[str]:
    """What does not fit between samples, or between the grid and the patches."""
    first = samples[0]
    height, width = len(first["lat"]), len(first["lon"])
    if width % patch_size or height % patch_size > 1 or height < patch_size:
        yield (
            f"grid: the width must be a multiple of the patch size {patch_size}, the height too, or"
            f" one more; got {height} x {width}; crop or interpolate"
        )
    shared = {name: [_tensor(sample[name]) for sample in samples] for name in ("lat", "lon")}
    try:
        aurora.Metadata(shared["lat"][0], shared["lon"][0], time=(), atmos_levels=())
    except ValueError as error:
        got = str(error).rstrip(".")
        yield f"lat, lon: must be a grid as Aurora's; got another: {got}; sort rows and columns"
    for name in static:
        fields = [s["static"][name] for s in samples if name in s["static"]]
        shared[f"static.{name}"] = [_tensor(field) for field in fields]
    for name, fields in shared.items():
        if any(not torch.equal(field, fields[0]) for field in fields[1:]):
            yield (
                f"{name}: must be the same in all samples of a batch; got several; set data.mixing"
                " = 'batch', or data.batch_size = 1"
            )


def _sample_problems(
    sample: Sample, kinds: Mapping[str, Sequence[str]], levels: Sequence[int], steps: int
) -> Iterator[str]:
    """Levels, variables and shapes that are not the model's."""
    if list(sample["levels"]) != list(levels):
        yield (
            f"levels: must be those of model.options.levels, {list(levels)}; got"
            f" {list(sample['levels'])}; set model.options.levels"
        )
        return
    lead = {"surf": [2], "atmos": [2], "target_surf": [steps], "target_atmos": [steps]}
    grid = [len(sample["lat"]), len(sample["lon"])]
    for kind, names in kinds.items():
        fields = sample[kind]
        height = [len(levels)] if kind.endswith("atmos") else []
        wanted = [*lead.get(kind, []), *height, *grid]
        for name in names:
            if name not in fields:
                yield (
                    f"{kind}.{name}: must be in every sample; got none{nearest(name, fields)};"
                    " add it to the data, or name the variables that there are in model.options"
                )
            elif list(fields[name].shape) != wanted:
                yield (
                    f"{kind}.{name}: must have the shape {wanted}; got"
                    f" {list(fields[name].shape)}; correct the data or model.options.rollout_steps"
                )
        for name in fields:
            if name not in names:
                yield (
                    f"{kind}.{name}: must be a variable of the model; got data without one"
                    f"{nearest(name, names)}; else leave it out, or add it in model.options"
                )


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32)
