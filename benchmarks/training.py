"""Whole training runs within a memory budget, beside PyTorch's own ways, in one process.

Usage: python -m benchmarks.training CASE OUT.jsonl [--budgets 80GB half least] [--peers] [--sweep]
    [--kernels off]

For each budget: the plan, the peak and time that its model predicts, the time of its rehearsal, the
peak and time that were measured with the budget enforced, and the loss and gradient norm of the
same batches, which nothing may change. `half` lies half-way between recomputing and keeping
everything, `least` a tenth above the least peak. Peers are what a user writes in plain PyTorch; the
sweep sets the trainer's blocks by hand: full checkpointing, every second and fourth block, and ten
values of torch's activation_memory_budget. The trainer's Swin has fastft's attention unless
`--kernels off` is given; peers have timm's.
"""

import argparse
import datetime
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.models import (
    Decoder,
    classifier_batch,
    classifier_task,
    markov_tokens,
    prototype_images,
    trainer_step,
)
from benchmarks.peers import PlainStep
from benchmarks.timing import time_steps
from fastft.adapters.timm_fused import use_kernels
from fastft.blocks import KEEP, RECOMPUTE, BlockForwards, Way
from fastft.config import OptimConfig, ScheduleConfig, parse_bytes
from fastft.errors import PlanError
from fastft.memory.budget import GIB, budget_bytes, enforce
from fastft.memory.plan import make_plan, measure_costs
from fastft.memory.rehearsal import free_cached
from fastft.memory.solve import peak_bytes
from fastft.profiling.flops import peak_flops
from fastft.runtime import environment
from fastft.step import TrainingStep
from fastft.task import Batch, Task

# As the command line sets it; read when torch first allocates.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
DEVICE = torch.device("cuda", 0)
# At this rate an update does all its work and moves no weight, so that all see the same.
OPTIM = OptimConfig(lr=1e-30, weight_decay=0.05, schedule=ScheduleConfig(name="constant"))
CLIP = 1.0
POOL, STEPS = 4, 8
PRECISION = "bf16"
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
# What bf16 and another order of additions may change of a loss, and of a gradient norm.
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-3, 2e-2
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its batches, and the FLOPs of its matrix products and attention per step."""

    make_model: Callable[[], nn.Module]
    make_batches: Callable[[], list[Pair]]
    samples: int
    flops: float
    compile: str = "blocks"

    def task(self) -> Task:
        """Always the same weights."""
        return classifier_task(self.make_model, DEVICE, seed=0)


def _decoder(batch: int, length: int) -> Case:
    width, layers, vocabulary = 2048, 24, 32768
    tokens = batch * length
    weights = layers * 12 * width**2 + width * vocabulary
    attention = layers * tokens * length * width * 2 / 2 * 2
    return Case(
        lambda: Decoder(width=width, layers=layers, heads=16, vocabulary=vocabulary, length=length),
        lambda: markov_tokens(POOL, batch, length, vocabulary, DEVICE, 0),
        batch,
        3 * (2 * weights * tokens + attention),
    )


def _images(name: str, batch: int, gflops: float, compiled: str = "blocks") -> Case:
    return Case(
        # Without dropped paths, which Swin has by default: losses are compared.
        lambda: timm.create_model(name, num_classes=1000, drop_path_rate=0.0),
        lambda: prototype_images(POOL, batch, 1000, DEVICE, 0),
        batch,
        3 * 2e9 * gflops * batch,
        compiled,
    )


CASES = {
    "gpt-2k": lambda: _decoder(8, 2048),
    "gpt-4k": lambda: _decoder(6, 4096),
    # Multiply-adds of a forward in 1e9: Dosovitskiy et al. 2021, Liu et al. 2021.
    "vit-l": lambda: _images("vit_large_patch16_224", 256, 61.6),
    "swin-b": lambda: _images("swin_base_patch4_window7_224", 256, 15.4),
    "vit-l-eager": lambda: _images("vit_large_patch16_224", 256, 61.6, "off"),
}


def measure(
    gradients: Callable[[Any], Sequence[Tensor]],
    run: Callable[[Any], object],
    pairs: Sequence[Any],
    steps: int = STEPS,
) -> dict[str, Any]:
    """Peak, time, and what must not change: loss and gradient norm of every batch.

    Args:
        gradients: loss and gradient norm of a batch; changes nothing.
        run: a whole step.
        steps: that are timed.
    """
    same = [value.item() for pair in pairs for value in gradients(pair)]
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    # The first step finds a host that is not yet ahead.
    times = time_steps(lambda i: run(pairs[i % len(pairs)]), steps + 1)[1:]
    return {
        "step_ms": round(statistics.median(times), 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "same": [round(value, 5) for value in same],
    }


def measure_plain(case: Case, pairs: list[Pair], **options: Any) -> dict[str, Any]:
    """One peer, built and gone again."""
    torch._dynamo.reset()
    step = PlainStep(case.task(), OPTIM, CLIP, **options)

    def gradients(pair: Pair) -> tuple[Tensor, Tensor]:
        found = step.gradients(*pair)
        step.zero_grad()
        return found

    return measure(gradients, lambda pair: step(*pair), pairs)


PEERS = {
    "eager, AdamW": {"fused": False},
    "torch.compile, fused AdamW": {"compiled": "model"},
    "torch.compile, every block checkpointed": {"compiled": "blocks", "checkpointed": True},
}


def measure_trainer(
    step: TrainingStep, batches: Sequence[Batch], steps: int = STEPS
) -> dict[str, Any]:
    """The trainer's step as its blocks run now."""

    def gradients(batch: Batch) -> tuple[Tensor, Tensor]:
        with step.rehearsal():
            result = step(0, [batch])
        return result.loss, cast(Tensor, result.verdict.norm)

    # Not a rehearsal, whose update is skipped.
    row = measure(gradients, lambda batch: step(0, [batch]), batches, steps)
    skipped = int(step.guard.counters()["skipped"].item())
    if skipped:
        raise SystemExit(f"{skipped} of the timed steps did not update; their times mean nothing")
    return row


def sweep(forwards: BlockForwards, shares: Sequence[float]) -> Iterator[str]:
    """Ways to set the blocks by hand, from the trainer's own step."""
    forwards.use_everywhere(KEEP)
    yield "keep all"
    forwards.use_everywhere(RECOMPUTE)
    yield "checkpoint every block"
    names = list(forwards.blocks)
    for every in (2, 4):
        forwards.use_everywhere(KEEP)
        forwards.use(dict.fromkeys(names[::every], RECOMPUTE.name))
        yield f"checkpoint one block in {every}"
    menu = dict(forwards.ways)
    for share in shares if forwards.mode == "blocks" else ():
        way = Way(f"keep {share:.0%}", share=share)
        forwards.ways[way.name] = way
        forwards.use_everywhere(way)
        yield f"activation_memory_budget {share}"
    # A plan has no more to choose from than in a run.
    forwards.use_everywhere(KEEP)
    forwards.ways = menu


class Records:
    """Rows of one case: printed and appended as they come, so that none is lost.

    Args:
        tolerances: relative, by which losses and gradient norms may differ between rows.
    """

    def __init__(
        self,
        case: str,
        samples: int,
        flops: float,
        out: Path,
        precision: str = PRECISION,
        tolerances: tuple[float, float] = (LOSS_TOLERANCE, NORM_TOLERANCE),
    ) -> None:
        self.case, self._samples, self._flops, self._out = case, samples, flops, out
        self._tolerances = tolerances
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._stamp = {"time": now, "machine": environment(DEVICE)}
        self._peak = peak_flops(torch.cuda.get_device_name(DEVICE), precision)
        self._same: list[float] = []

    def add(self, runner: str, measure: Callable[[], dict[str, Any]], **more: Any) -> None:
        """Measures one row; what does not fit is a row too."""
        row = {"benchmark": "training", "case": self.case, "runner": runner, **more}
        try:
            row |= measure()
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None
            row["out_of_memory"] = True
        else:
            row["samples_per_second"] = round(1e3 * self._samples / row["step_ms"], 1)
            if self._peak is not None:
                row["mfu"] = round(self._flops / (row["step_ms"] / 1e3) / self._peak, 4)
            self._compare(row)
        self.rows.append(row)
        print({k: v for k, v in row.items() if k != "benchmark"}, flush=True)
        with self._out.open("a") as lines:
            lines.write(json.dumps({**row, **self._stamp}) + "\n")
        free_cached()

    def _compare(self, row: dict[str, Any]) -> None:
        self._same = self._same or row["same"]
        for i, (a, b) in enumerate(zip(row["same"], self._same, strict=True)):
            if not math.isclose(a, b, rel_tol=self._tolerances[i % 2]):
                self.wrong.append(f"{row['runner']}: {'norm' if i % 2 else 'loss'} {a}, not {b}")

    def table(self) -> Table:
        """What was measured."""
        columns = ("runner", "step_ms", "mfu", "peak_gib", "reserved_gib")
        columns += ("budget_gib", "predicted_gib", "predicted_ms", "rehearsed_ms")
        table = Table(*columns, title=f"{self.case} on {torch.cuda.get_device_name(DEVICE)}")
        for row in self.rows:
            table.add_row(*(str(row.get(column, "-")) for column in columns))
        return table


def within_budget(
    budget: str, step: TrainingStep, forwards: BlockForwards, pool: list[Batch], records: Records
) -> None:
    """Plans and measures with the budget enforced."""
    batches = pool[:1]
    if budget in ("half", "least"):
        costs = measure_costs(step, forwards, batches, offload=budget == "least")
        least = peak_bytes(costs, [len(block.choices) - 1 for block in costs.blocks])
        most = peak_bytes(costs, [0] * len(costs.blocks))
        limit = (least + most) // 2 if budget == "half" else round(least * 1.1)
        for choice in costs.blocks[0].choices:
            print(choice, flush=True)
        del costs
    else:
        limit = budget_bytes(parse_bytes(budget), DEVICE)
    enforce(limit, DEVICE)
    # A run plans before its optimizer has any state; made under another plan, it lies elsewhere.
    step.optimizer.forget()
    began = time.perf_counter()
    try:
        plan = make_plan(step, forwards, batches, limit, Console(width=150))
    except PlanError as error:
        print(budget, error, flush=True)
    else:
        # As in a run.
        free_cached()
        predicted, modelled, rehearsed = (
            plan.predicted_bytes,
            plan.predicted_seconds,
            plan.seconds,
        )
        records.add(
            f"fastft, {budget}",
            lambda: measure_trainer(step, pool),
            budget_gib=round(limit / GIB, 3),
            predicted_gib=None if predicted is None else round(predicted / GIB, 3),
            predicted_ms=None if modelled is None else round(1e3 * modelled, 2),
            rehearsed_ms=None if rehearsed is None else round(1e3 * rehearsed, 2),
            planned_in_s=round(time.perf_counter() - began, 1),
            ways=plan.summary(),
        )
    enforce(None, DEVICE)


def main() -> None:
    """One case: peers, the sweep, then budgets."""
    parser = argparse.ArgumentParser(description="Training within a memory budget.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", nargs="*", default=["80GB", "half", "40GB", "24GB", "least"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="these, or all")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--layer-norm", choices=["torch", "fused"], default="torch")
    parser.add_argument("--kernels", choices=["auto", "off"], default="auto", help="of timm's Swin")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES)
    arguments = parser.parse_args()
    case = CASES[arguments.case]()
    pairs = case.make_batches()
    name = arguments.case + (", fused norms" if arguments.layer_norm == "fused" else "")
    name += ", timm's attention" if arguments.kernels == "off" else ""
    records = Records(name, case.samples, case.flops, arguments.out)
    for name in PEERS if arguments.peers == [] else arguments.peers or ():
        records.add(name, lambda name=name: measure_plain(case, pairs, **PEERS[name]))
    torch._dynamo.reset()
    settings = {"precision": PRECISION, "compile": case.compile}
    settings["layer_norm"] = arguments.layer_norm
    task = case.task()
    if arguments.kernels == "auto":
        use_kernels(task.model)
    step, forwards = trainer_step(task, DEVICE, OPTIM, clip_norm=CLIP, **settings)
    batches = [classifier_batch(pair) for pair in pairs]
    for name in sweep(forwards, arguments.shares) if arguments.sweep else ():
        records.add(name, lambda: measure_trainer(step, batches))
    for budget in arguments.budgets:
        within_budget(budget, step, forwards, batches, records)
    Console(width=150).print(records.table())
    if records.wrong:
        sys.exit("\n".join(["losses differ:", *records.wrong]))


if __name__ == "__main__":
    main()
