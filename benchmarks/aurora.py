"""Aurora at 721 x 1440 points and 13 levels: upstream's recipe beside fastft, in one process.

Usage: python -m benchmarks.aurora OUT.jsonl [--size full small] [--modes bf16 ...]
    [--ways "keep 20%" "recompute all"] [--budgets 80GB 48GB] [--rollout 2] [--skip-upstream]
    [--moments bf16] [--cap 80GB]

Every runner starts from the same random weights, the modulation of the Swin blocks among them (at
its initialisation every block is the identity), and sees the same random fields. `--ways` runs all
blocks one way; `--budgets` plans: `plan_s` is how long that took, `shared_s` what of it was for all
budgets. Memory is held to 80 GB for all, as an A100 has, or to `--cap`; `--moments` are of fastft's
optimizer. Upstream is measured at one step of the roll-out.
"""

import argparse
import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import aurora
import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.breakdown import break_down
from benchmarks.models import trainer_step
from benchmarks.training import CLIP, DEVICE, OPTIM, PRECISION, Records, measure, measure_trainer
from fastft.adapters.aurora import AuroraAdapter, AuroraOptions
from fastft.blocks import BlockForwards
from fastft.config import OptimConfig, parse_bytes
from fastft.errors import PlanError
from fastft.memory.budget import GIB, budget_bytes, enforce
from fastft.memory.plan import make_plan, measure_costs
from fastft.optim import make_groups
from fastft.runfile import parse
from fastft.step import TrainingStep
from fastft.task import Batch, Task

# Class, grid, and the FLOPs of three forwards.
SIZES = {
    "full": ("AuroraPretrained", (721, 1440), 3 * 97e12),
    "high": ("AuroraHighRes", (1801, 3600), 3 * 91.7e12),
    "small": ("AuroraSmallPretrained", (721, 1440), 0.0),
    "tiny": ("AuroraSmallPretrained", (17, 32), 0.0),
}
BATCHES, STEPS = 2, 4
# `[model.options]` and `[step]`: which parts compute in what.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16 backbone": ({"autocast": "backbone"}, {"precision": "bf16"}),
    "bf16 backbone, TF32": (
        {"autocast": "backbone", "residual": "autocast"},
        {"precision": "bf16", "tf32": True},
    ),
    "bf16": ({"autocast": "all", "residual": "autocast"}, {"precision": "bf16"}),
    "bf16, fp32 residual": ({"autocast": "all"}, {"precision": "bf16"}),
    "fp16": ({"autocast": "all", "residual": "autocast"}, {"precision": "fp16"}),
    "fp16, bf16 backbone": (
        {"autocast": "all", "residual": "autocast", "backbone": "bf16"},
        {"precision": "fp16"},
    ),
}


def make_adapter(size: str, **options: Any) -> AuroraAdapter:
    """All levels and variables of the class."""
    tree = {"model_class": SIZES[size][0], **options}
    return AuroraAdapter(parse(AuroraOptions, tree, key="model.options"))


def make_batches(adapter: AuroraAdapter, size: str, device: torch.device) -> list[Batch]:
    """Random fields, one deviation above the means, so that there is something to learn."""
    grid, levels = SIZES[size][1], adapter.options.levels
    variables, draw = adapter.variables, torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return torch.randn(shape, generator=draw, device=device).cpu().numpy()

    def fields(names: tuple[str, ...], count: int) -> dict[str, np.ndarray]:
        found = {}
        for name in names:
            if name in variables.levels:
                pairs = [variables.levels[name][str(level)] for level in levels]
                location, scale = np.array(pairs).T[:, :, None, None]
                shape = (count, len(levels), *grid)
            else:
                location, scale = variables.statistics[name]
                shape = (count, *grid)
            noise = 1 + normal(shape)
            found[name] = (location + scale * noise).astype(np.float32)
        return found

    static = {name: normal(grid) for name in variables.static}
    steps = adapter.options.rollout_steps
    samples = [
        {
            "surf": fields(tuple(variables.surf), 2),
            "atmos": fields(tuple(variables.atmos), 2),
            "static": static,
            "target_surf": fields(tuple(variables.surf), steps),
            "target_atmos": fields(tuple(variables.atmos), steps),
            "time": np.int64(1_590_969_600 + 6 * 3600 * index),
            "lat": np.linspace(90, -90, grid[0], dtype=np.float32),
            "lon": np.linspace(0, 360, grid[1], endpoint=False, dtype=np.float32),
            "levels": list(levels),
        }
        for index in range(BATCHES)
    ]
    return [Batch(adapter.collate([sample]), 1).to(device) for sample in samples]


def make_task(adapter: AuroraAdapter, device: torch.device) -> Task:
    """Always the same weights."""
    torch.manual_seed(0)
    task = adapter.build(None, device=device, checkpoint=None, pretrained=False)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if "ln_modulation" in name:
                parameter.normal_(std=0.02)
    return task


class UpstreamStep:
    """Upstream's guide: its autocast and checkpoints, AdamW, clip_grad_norm_.

    The loss is the adapter's, of upstream's own forward.
    """

    def __init__(
        self, task: Task, size: str, optim: OptimConfig = OPTIM, autocast: bool = True
    ) -> None:
        self._loss = cast(Any, task.loss)
        self._model = getattr(aurora, SIZES[size][0])(autocast=autocast)
        self._model.load_state_dict(task.model.state_dict())
        self._model.to(next(task.model.parameters()).device)
        self._model.configure_activation_checkpointing()
        groups: list[dict[str, Any]] = [
            {"params": list(group.parameters.values()), "weight_decay": group.weight_decay}
            for group in make_groups(Task(self._model, task.loss), optim, {})
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=optim.lr)

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and the norm of its gradients, which it leaves clipped."""
        data = batch.data
        predicted = self._model(
            aurora.Batch(
                surf_vars=dict(data["surf"]),
                static_vars=dict(data["static"]),
                atmos_vars=dict(data["atmos"]),
                metadata=aurora.Metadata(
                    lat=data["lat"],
                    lon=data["lon"],
                    time=tuple(datetime.fromtimestamp(t, UTC) for t in data["time"]),
                    atmos_levels=data["levels"],
                ),
            )
        )
        loss = self._loss._total(self._loss._errors(predicted, data, 0))
        loss.backward()
        return loss.detach(), nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; checkpoint wrappers are no part of the names."""
        mark = "_checkpoint_wrapped_module."
        return {n.replace(mark, ""): p for n, p in self._model.named_parameters()}

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def __call__(self, batch: Batch) -> Tensor:
        """One step; the loss."""
        loss, _ = self.gradients(batch)
        self._optimizer.step()
        self.zero_grad()
        return loss


def measure_upstream(task: Task, size: str, batches: list[Batch]) -> dict[str, Any]:
    """Upstream's row."""
    step = UpstreamStep(task, size)
    task.model.to("cpu")

    def gradients(batch: Batch) -> tuple[Tensor, Tensor]:
        found = step.gradients(batch)
        step.zero_grad()
        return found

    return measure(gradients, step, batches, STEPS) | break_down(
        lambda: step(batches[0]), PRECISION
    )


def measure_ours(step: TrainingStep, batches: list[Batch]) -> dict[str, Any]:
    """A row of ours."""
    row = measure_trainer(step, batches, STEPS)
    return row | break_down(lambda: step(0, batches[:1]), PRECISION)


def rows_of_fastft(arguments: argparse.Namespace, mode: str, records: Records) -> Iterator[str]:
    """Measures every way and budget; yields what could not be planned."""
    options, settings = MODES[mode]
    name = f"fastft, {mode}"
    if arguments.moments != "fp32":
        name = f"{name}, {arguments.moments} moments"
    if arguments.rollout > 1:
        options, name = (
            {**options, "rollout_steps": arguments.rollout},
            f"{name}, {arguments.rollout} steps",
        )
    adapter = make_adapter(arguments.size, **options)
    batches = make_batches(adapter, arguments.size, DEVICE)
    task = make_task(adapter, DEVICE)
    optim = replace(OPTIM, moments=arguments.moments)
    step, forwards = trainer_step(task, DEVICE, optim, CLIP, compile="blocks", **settings)
    for way in arguments.ways:
        forwards.use_everywhere(forwards.ways[way])
        records.add(f"{name}, {way}", lambda: measure_ours(step, batches))
    yield from plan_budgets(arguments.budgets, name, step, forwards, batches, records)


def plan_budgets(
    budgets: list[str],
    name: str,
    step: TrainingStep,
    forwards: BlockForwards,
    batches: list[Batch],
    records: Records,
) -> Iterator[str]:
    """A row for each budget; what several share is measured once, and its time is in each."""
    limits = {budget: budget_bytes(parse_bytes(budget), DEVICE) for budget in budgets}
    costs, began = None, time.perf_counter()
    if len(limits) > 1:
        wanted = list(limits.values())
        enforce(max(wanted), DEVICE)
        with contextlib.suppress(torch.OutOfMemoryError):
            costs = measure_costs(step, forwards, batches[:1], print, offload=False, limits=wanted)
    shared = time.perf_counter() - began
    for budget, limit in limits.items():
        enforce(limit, DEVICE)
        began = time.perf_counter()
        try:
            plan = make_plan(step, forwards, batches[:1], limit, Console(width=150), costs)
        except PlanError as error:
            yield f"{budget}: {error}"
            continue
        records.add(
            f"{name}, {budget}",
            lambda: measure_ours(step, batches),
            budget_gib=round(limit / GIB, 3),
            predicted_gib=plan.predicted_bytes and round(plan.predicted_bytes / GIB, 3),
            plan_s=round(shared + time.perf_counter() - began, 1),
            shared_s=round(shared, 1),
            ways=plan.summary(),
        )


def main() -> None:
    """Upstream first, then fastft."""
    parser = argparse.ArgumentParser(description="Aurora beside upstream's recipe.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["bf16"])
    parser.add_argument("--ways", nargs="*", default=["recompute all"])
    parser.add_argument("--rollout", type=int, default=1)
    parser.add_argument("--budgets", nargs="*", default=[])
    parser.add_argument("--skip-upstream", action="store_true")
    parser.add_argument("--moments", choices=["fp32", "bf16", "8bit"], default="fp32")
    parser.add_argument("--cap", default="80GB", help="memory of all but plans")
    arguments = parser.parse_args()
    held = "" if arguments.cap == "80GB" else f", held to {arguments.cap}"
    records = Records(f"aurora, {arguments.size}{held}", 1, SIZES[arguments.size][2], arguments.out)
    enforce(budget_bytes(parse_bytes(arguments.cap), DEVICE), DEVICE)
    if not arguments.skip_upstream:
        adapter = make_adapter(arguments.size)
        batches = make_batches(adapter, arguments.size, DEVICE)
        records.add(
            "upstream's recipe",
            lambda: measure_upstream(make_task(adapter, DEVICE), arguments.size, batches),
        )
    for mode in arguments.modes:
        for problem in rows_of_fastft(arguments, mode, records):
            print(problem, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    Console(width=150).print(records.table())
    for line in records.wrong:
        print(line)


if __name__ == "__main__":
    main()
