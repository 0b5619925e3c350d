"""Upstream's own batches and models, for tests that compare with them."""

import warnings
from datetime import UTC, datetime, timedelta
from typing import Any

import aurora
import torch


def upstream_batch(samples: list[Any]) -> aurora.Batch:
    """The samples as aurora's own batch."""

    def stack(kind: str) -> dict[str, torch.Tensor]:
        names = samples[0][kind]
        return {n: torch.stack([torch.tensor(s[kind][n]) for s in samples]) for n in names}

    first = samples[0]
    return aurora.Batch(
        surf_vars=stack("surf"),
        static_vars={name: torch.tensor(field) for name, field in first["static"].items()},
        atmos_vars=stack("atmos"),
        metadata=aurora.Metadata(
            lat=torch.tensor(first["lat"]),
            lon=torch.tensor(first["lon"]),
            time=tuple(datetime.fromtimestamp(int(s["time"]), UTC) for s in samples),
            atmos_levels=tuple(first["levels"]),
        ),
    )


def upstream_model(record: dict[str, Any]) -> aurora.Aurora:
    """The model of the file beside an exported checkpoint, with nothing of fastft's in it."""
    names = ("surf_vars", "static_vars", "atmos_vars")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The normalisation statics")
        return getattr(aurora, record["model_class"])(
            **{name: tuple(record[name]) for name in names},
            surf_stats={name: tuple(pair) for name, pair in record["surf_stats"].items()},
            stabilise_level_agg=record["stabilise_level_agg"],
            timestep=timedelta(hours=record["timestep_hours"]),
            **{name: tuples(value) for name, value in record["arguments"].items()},
        )


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, list) else value
