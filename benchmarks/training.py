"""Whole training runs within a memory budget, beside PyTorch's own ways, in one process.

Usage: python -m benchmarks.training CASE OUT.jsonl [--budgets 80GB 40GB half least] [--peers]

For each budget: the plan, the peak that it predicts, the peak and time that were measured with the
budget enforced, and the loss and gradient norm of the same batches, which no plan may change.
`half` lies half-way between recomputing everything and keeping everything.
"""

import argparse
import datetime
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.models import (
    Decoder,
    classifier_task,
    markov_tokens,
    prototype_images,
    trainer_step,
)
from fastft.blocks import KEEP, RECOMPUTE, BlockForwards
from fastft.config import OptimConfig, ScheduleConfig, parse_bytes
from fastft.memory.budget import GIB, budget_bytes, enforce
from fastft.memory.measure import rehearse
from fastft.memory.plan import make_plan, measure_costs
from fastft.memory.solve import peak_bytes, smallest_peak
from fastft.profiling.flops import peak_flops
from fastft.runtime import environment
from fastft.step import TrainingStep
from fastft.task import Batch

# As the command line sets it; read when torch first allocates.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
DEVICE = torch.device("cuda", 0)
OPTIM = OptimConfig(lr=1e-5, weight_decay=0.05, schedule=ScheduleConfig(name="constant"))
POOL, STEPS = 4, 8
PRECISION = "bf16"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its batches, and the FLOPs of its matrix products and attention per step."""

    make_model: Callable[[], nn.Module]
    make_batches: Callable[[], list[Pair]]
    samples: int
    flops: float
    compile: str = "blocks"


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
        lambda: timm.create_model(name, num_classes=1000),
        lambda: prototype_images(POOL, batch, 1000, DEVICE, 0),
        batch,
        3 * 2e9 * gflops * batch,
        compiled,
    )


CASES = {
    "gpt-2k": lambda: _decoder(8, 2048),
    "gpt-4k": lambda: _decoder(4, 4096),
    # Multiply-adds of a forward in 1e9: Dosovitskiy et al. 2021, Liu et al. 2021.
    "vit-l": lambda: _images("vit_large_patch16_224", 128, 61.6),
    "swin-b": lambda: _images("swin_base_patch4_window7_224", 128, 15.4),
    "vit-l-eager": lambda: _images("vit_large_patch16_224", 128, 61.6, "off"),
}


def make_step(case: Case) -> tuple[TrainingStep, BlockForwards, list[Batch]]:
    """The trainer's step, how its blocks run, and its batches."""
    task = classifier_task(case.make_model, DEVICE, seed=0)
    settings = {"precision": PRECISION, "compile": case.compile}
    step, forwards = trainer_step(task, DEVICE, OPTIM, clip_norm=1.0, **settings)
    pairs = case.make_batches()
    batches = [Batch({"inputs": x, "targets": y}, len(x)) for x, y in pairs]
    return step, forwards, batches


def measure(step: TrainingStep, batches: list[Batch]) -> dict[str, Any]:
    """Peak, time, and what must not change: loss and gradient norm of every batch."""
    same = []
    for batch in batches:
        with step.rehearsal():
            result = step(0, [batch])
            same += [result.loss, result.verdict.norm]
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    marks[0].record()
    for i, mark in enumerate(marks[1:]):
        # A rehearsal updates too, only with nothing changed, so every plan sees the same weights.
        rehearse(step, [batches[i % len(batches)]])
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return {
        "step_ms": round(statistics.median(times), 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "same": [round(value.item(), 5) for value in same],
    }


def peers(step: TrainingStep, forwards: BlockForwards) -> Iterator[str]:
    """PyTorch's own ways over the same step: full checkpointing, every n-th block, budgets."""
    forwards.use_everywhere(KEEP)
    yield "keep all"
    forwards.use_everywhere(RECOMPUTE)
    yield "checkpoint every block"
    names = list(forwards.blocks)
    for every in (2, 4):
        forwards.use_everywhere(KEEP)
        forwards.use(dict.fromkeys(names[::every], RECOMPUTE.name))
        yield f"checkpoint every {every}nd block" if every == 2 else f"every {every}th block"
    if forwards.mode == "blocks":
        for share in (0.75, 0.5, 0.35, 0.2):
            forwards.use_everywhere(forwards.ways[f"keep {share:.0%}"])
            yield f"activation_memory_budget {share}"


def main() -> None:
    """One case: peers without a budget, then budgets."""
    parser = argparse.ArgumentParser(description="Training within a memory budget.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", nargs="*", default=["half", "least"])
    parser.add_argument("--peers", action="store_true")
    arguments = parser.parse_args()
    case = CASES[arguments.case]()
    step, forwards, batches = make_step(case)
    rows: list[dict[str, Any]] = []
    peak = peak_flops(torch.cuda.get_device_name(DEVICE), PRECISION)

    def add(name: str, **more: Any) -> None:
        row = {"benchmark": "training", "case": arguments.case, "runner": name, **more}
        row |= measure(step, batches)
        row["samples_per_second"] = round(1e3 * case.samples / row["step_ms"], 1)
        if peak is not None:
            row["mfu"] = round(case.flops / (row["step_ms"] / 1e3) / peak, 4)
        rows.append(row)
        print({k: v for k, v in row.items() if k != "benchmark"}, flush=True)

    began = time.perf_counter()
    costs = measure_costs(step, forwards, batches[:1])
    print(f"measured in {time.perf_counter() - began:.1f} s", costs.blocks[0], costs.blocks[-1])
    print({k: v for k, v in vars(costs).items() if k != "blocks"}, flush=True)
    if arguments.peers:
        for name in peers(step, forwards):
            add(name)
    least, _ = smallest_peak(costs)
    most = peak_bytes(costs, [0] * len(costs.blocks))
    for budget in arguments.budgets:
        if budget == "half":
            limit = (least + most) // 2
        elif budget == "least":
            limit = round(least * 1.03)
        else:
            limit = budget_bytes(parse_bytes(budget), DEVICE)
        enforce(limit, DEVICE)
        gc.collect()
        torch.cuda.empty_cache()
        began = time.perf_counter()
        plan = make_plan(step, forwards, batches[:1], limit, Console(width=150))
        spent = round(time.perf_counter() - began, 1)
        print(plan.summary(), flush=True)
        predicted = plan.predicted_bytes or peak_bytes(costs, [0] * len(costs.blocks))
        add(
            f"fastft, {budget}",
            budget_gib=round(limit / GIB, 3),
            predicted_gib=round(predicted / GIB, 3),
            predicted_ms=round(1e3 * (plan.predicted_seconds or 0), 2),
            planned_in_s=spent,
            ways=plan.summary(),
        )
        enforce(None, DEVICE)
    _report(rows, arguments.case, arguments.out)


def _report(rows: list[dict[str, Any]], case: str, out: Path) -> None:
    machine, now = environment(DEVICE), datetime.datetime.now(datetime.UTC)
    table = Table(title=f"{case} on {machine['device']['name']}")
    columns = ("runner", "step_ms", "mfu", "peak_gib", "reserved_gib")
    columns += ("budget_gib", "predicted_gib", "predicted_ms")
    for column in columns:
        table.add_column(column)
    stamp = {"time": now.isoformat(timespec="seconds"), "machine": machine}
    with out.open("a") as lines:
        for row in rows:
            table.add_row(*(str(row.get(column, "-")) for column in columns))
            lines.write(json.dumps({**row, **stamp}) + "\n")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
