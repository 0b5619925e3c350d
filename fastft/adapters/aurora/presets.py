"""Learning rates and schedules that Aurora was trained with, for `optim.preset`.

From Bodnar et al. 2024 (arXiv 2405.13063), Supplement D, and from upstream's guide to fine-tuning.
"""

from collections.abc import Collection
from typing import Any

from fastft.adapters.aurora.build import default_variables
from fastft.adapters.aurora.options import AuroraOptions
from fastft.config import ModelConfig


def optim_presets(
    options: AuroraOptions, model: ModelConfig, new_heads: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Name -> part of `[optim]`.

    What is new has a group of its own: the run's new heads, which are all that a checkpoint lacks
    that is loaded strictly; else also embeddings and heads of variables that the class has not,
    which are all that the hub's weights lack.
    """
    of_class = [] if model.checkpoint is not None and model.strict else _new_patterns(options)
    # A head is a module or a single parameter.
    of_run = [pattern for head in new_heads for pattern in (head, f"{head}.*")]
    new = list(dict.fromkeys([*of_class, *of_run]))
    groups = [{"match": new, "lr": 1e-3}] if new else []
    return {
        # Of the guide, which says nothing of a schedule.
        "guide": {"lr": 3e-4, "groups": groups},
        "pretrain": {
            "lr": 5e-4,
            "weight_decay": 5e-6,
            "schedule": {"name": "cosine", "warmup_steps": 1000, "end_factor": 0.1},
        },
        "hres-0.25": {"lr": 5e-5, "weight_decay": 5e-6, "schedule": _constant(1000)},
        "hres-0.1": {"lr": 2e-4, "weight_decay": 0.0, "schedule": _constant(1000)},
        "pollution": {
            **{"lr": 1e-4, "weight_decay": 0.0},
            **{"groups": groups, "schedule": _constant(100)},
        },
        "wave": {
            "lr": 3e-4,
            "groups": groups,
            # Down to 1e-5.
            "schedule": {"name": "cosine", "warmup_steps": 500, "end_factor": 1 / 30},
        },
        "rollout": {"lr": 5e-5, "schedule": _constant(0)},
    }


def _constant(warmup_steps: int) -> dict[str, Any]:
    return {"name": "constant", "warmup_steps": warmup_steps}


def _new_patterns(options: AuroraOptions) -> list[str]:
    """Names of what belongs to variables that the class does not have by default."""
    surf, static, atmos = (
        [name for name in getattr(options, kind) or () if name not in usual]
        for kind, usual in default_variables(options).items()
    )
    # A user's module may hold aurora's model.
    start = "*" if options.hook else ""
    patterns = [
        *(f"encoder.surf_token_embeds.weights.{name}" for name in (*surf, *static)),
        # With a number of levels before `weights` where the class conditions on them.
        *(f"encoder.atmos_token_embeds.*weights.{name}" for name in atmos),
        *(f"decoder.surf_heads.{name}.*" for name in surf),
        *(f"decoder.atmos_heads.{name}.*" for name in atmos),
    ]
    return [f"{start}{pattern}" for pattern in patterns]
