"""Launch-bound training steps, uncaptured and replayed from a CUDA graph, in one process.

Usage: python -m benchmarks.graphs OUT.jsonl

Small batches of small models, blocks compiled and eager, through the choice that a run with
`step.cuda_graphs = "auto"` makes. Losses of ten steps from the same weights must be equal, up to
what attention's backward adds in no fixed order.
"""

import argparse
import datetime
import gc
import itertools
import json
import math
import statistics
from collections.abc import Callable
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
    classifier_batch,
    classifier_task,
    markov_tokens,
    prototype_images,
    trainer_step,
)
from benchmarks.timing import time_steps
from fastft.config import MemoryConfig, OptimConfig, ScheduleConfig
from fastft.graphs.choose import choose_graph
from fastft.graphs.record import make_record_on_gpu
from fastft.memory import enforced_limit, try_rehearsal
from fastft.memory.meter import DeviceMeter
from fastft.runtime import environment
from fastft.step import TrainingStep
from fastft.task import Batch

DEVICE = torch.device("cuda", 0)
OPTIM = OptimConfig(lr=1e-4, weight_decay=0.05, schedule=ScheduleConfig(name="constant"))
POOL, STEPS, TIMED = 4, 10, 30
GIB = 2**30
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A model and its batches."""

    make_model: Callable[[], nn.Module]
    make_batches: Callable[[], list[tuple[Tensor, Tensor]]]


CASES = {
    "vit-ti, batch 8": Case(
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=1000),
        lambda: prototype_images(POOL, 8, 1000, DEVICE, 0),
    ),
    "decoder, 512 tokens": Case(
        lambda: Decoder(width=512, layers=12, heads=8, vocabulary=8192, length=512),
        lambda: markov_tokens(POOL, 1, 512, 8192, DEVICE, 0),
    ),
}


def train_anew(step: TrainingStep, batches: list[Batch], start: dict[str, Tensor]) -> list[float]:
    """The losses of steps from the same weights."""
    step.task.model.load_state_dict(start)
    step.optimizer.forget()
    losses = [step(i, [batches[i % POOL]]).loss for i in range(STEPS)]
    return [loss.item() for loss in losses]


def step_ms(step: TrainingStep, batches: list[Batch]) -> float:
    """Median time of real steps, as the host launches them one after the other."""
    return statistics.median(time_steps(lambda i: step(STEPS + i, [batches[i % POOL]]), TIMED))


def measure(name: str, case: Case, mode: str) -> dict[str, Any]:
    """One model, compiled or not: both times, both memories, and the decision."""
    task = classifier_task(case.make_model, DEVICE, seed=0)
    settings = {"precision": "bf16", "compile": mode}
    step, _ = trainer_step(task, DEVICE, OPTIM, clip_norm=1.0, **settings)
    batches = [classifier_batch(pair) for pair in case.make_batches()]
    start = {key: value.clone() for key, value in task.model.state_dict().items()}
    expected = train_anew(step, batches, start)
    plain_ms, plain_gib = step_ms(step, batches), torch.cuda.memory_reserved() / GIB
    limit = enforced_limit(MemoryConfig(), DEVICE)
    graph, decision = choose_graph(
        step,
        [batches[:1], batches[1:2]],
        10_000,
        record=make_record_on_gpu(DEVICE),
        fits=lambda: try_rehearsal(step, batches[:1], limit) is not None,
        meter=DeviceMeter(DEVICE),
        say=print,
    )
    row: dict[str, Any] = {"benchmark": "graphs", "case": name, "compile": mode}
    row |= {"decision": decision, "uncaptured_ms": round(plain_ms, 3)}
    row["uncaptured_reserved_gib"] = round(plain_gib, 3)
    if graph is not None:
        step.graph = graph
        losses = train_anew(step, batches, start)
        for a, b in zip(losses, expected, strict=True):
            assert math.isclose(a, b, rel_tol=TOLERANCE), (losses, expected)
        captured_ms = step_ms(step, batches)
        row |= {"captured_ms": round(captured_ms, 3), "ratio": round(plain_ms / captured_ms, 2)}
        row["captured_reserved_gib"] = round(torch.cuda.memory_reserved() / GIB, 3)
        row["same_bits"] = losses == expected
    print(row, flush=True)
    return row


def main() -> None:
    """Every case, compiled and eager."""
    parser = argparse.ArgumentParser(description="Steps replayed from a CUDA graph.")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    rows = []
    for (name, case), mode in itertools.product(CASES.items(), ("off", "blocks")):
        rows.append(measure(name, case, mode))
        gc.collect()
        torch.cuda.empty_cache()
    machine, now = environment(DEVICE), datetime.datetime.now(datetime.UTC)
    columns = ("case", "compile", "uncaptured_ms", "captured_ms", "ratio", "same_bits")
    columns += ("uncaptured_reserved_gib", "captured_reserved_gib")
    table = Table(title=f"Training steps on {machine['device']['name']}")
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
