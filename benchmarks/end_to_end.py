"""Whole training steps: fastft beside plain PyTorch and torch.compile, in one process.

Usage: python -m benchmarks.end_to_end vit|gpt OUT.jsonl [--steps 200]

Every runner starts from the same weights and sees the same batches with the same AdamW groups,
bf16 autocast and clipping. First each takes its steps, which gives the loss curves and the memory;
then all are timed in turns, so that a card that warms up or slows down does so for everyone. The
noise of a curve is that of the eager runner with other seeds for weights and data.
"""

import argparse
import datetime
import itertools
import json
import statistics
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
    classifier_batch,
    classifier_task,
    markov_tokens,
    prototype_images,
    trainer_step,
)
from benchmarks.peers import PlainStep
from benchmarks.timing import time_steps
from fastft.config import OptimConfig, ScheduleConfig
from fastft.runtime import environment
from fastft.task import Task

DEVICE = torch.device("cuda", 0)
CLIP = 1.0
POOL, WINDOW = 20, 10
ROUNDS, STEPS_PER_ROUND = 4, 10
OTHER_SEEDS = {"eager, seed 1": 1, "eager, seed 2": 2}
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and its batches."""

    make_model: Callable[[], nn.Module]
    make_batches: Callable[[int], list[Pair]]
    tokens_per_step: int
    lr: float = 1e-4

    @property
    def optim(self) -> OptimConfig:
        """AdamW at a constant rate."""
        schedule = ScheduleConfig(name="constant")
        return OptimConfig(lr=self.lr, weight_decay=0.05, schedule=schedule)


CASES = {
    "vit": Case(
        lambda: timm.create_model("vit_base_patch16_224", num_classes=100),
        lambda seed: prototype_images(POOL, 128, 100, DEVICE, seed),
        128 * 197,
        # At 1e-4 without warm-up the curve is chaotic: torch.compile strays further than a seed.
        lr=2e-5,
    ),
    "gpt": Case(
        lambda: Decoder(width=3200, layers=4, heads=25, vocabulary=512, length=1024),
        lambda seed: markov_tokens(POOL, 4, 1024, 512, DEVICE, seed),
        4 * 1024,
    ),
}


def plain_step(task: Task, optim: OptimConfig, compiled: str) -> Callable[[int, Pair], Tensor]:
    """Plain PyTorch's."""
    step = PlainStep(task, optim, CLIP, compiled=compiled)
    return lambda index, pair: step(*pair)


def fastft_step(
    task: Task, optim: OptimConfig, compiled: str, layer_norm: str
) -> Callable[[int, Pair], Tensor]:
    """The trainer's own step."""
    settings = {"precision": "bf16", "compile": compiled, "layer_norm": layer_norm}
    step, _ = trainer_step(task, DEVICE, optim, CLIP, **settings)

    def run(index: int, pair: Pair) -> Tensor:
        return step(index, [classifier_batch(pair)]).loss

    return run


def runners() -> Iterator[tuple[str, int, Callable[..., Callable[[int, Pair], Tensor]]]]:
    """(name, seed, function of task and settings -> step); the first is the reference."""
    yield "eager", 0, lambda task, optim: plain_step(task, optim, compiled="off")
    for name, seed in OTHER_SEEDS.items():
        yield name, seed, lambda task, optim: plain_step(task, optim, compiled="off")
    yield "compile", 0, lambda task, optim: plain_step(task, optim, compiled="model")
    yield "fastft, compile off", 0, lambda task, optim: fastft_step(task, optim, "off", "torch")
    yield "fastft, off, fused norm", 0, lambda task, optim: fastft_step(task, optim, "off", "fused")
    yield "fastft, compile model", 0, lambda task, optim: fastft_step(task, optim, "model", "torch")
    yield (
        "fastft, compile blocks",
        0,
        lambda task, optim: fastft_step(task, optim, "blocks", "torch"),
    )
    yield (
        "fastft, blocks, fused norm",
        0,
        lambda task, optim: fastft_step(task, optim, "blocks", "fused"),
    )


def main() -> None:
    """Curves and memory, then times in turns."""
    parser = argparse.ArgumentParser(description="Whole training steps beside their peers.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--skip", nargs="*", default=[], help="runners to leave out, by name")
    arguments = parser.parse_args()
    known = [name for name, _, _ in runners()]
    for name in arguments.skip:
        if name == known[0]:
            parser.error(f"--skip: '{name}' must run: the gaps of all curves are to its own")
        if name not in known:
            parser.error(f"--skip: must be one of {'; '.join(known[1:])}; got '{name}'")
    case = CASES[arguments.case]
    batches = {seed: case.make_batches(seed) for seed in (0, *OTHER_SEEDS.values())}
    steps: dict[str, Callable[[int], Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, seed, make in runners():
        if name in arguments.skip:
            continue
        torch._dynamo.reset()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = make(classifier_task(case.make_model, DEVICE, seed), case.optim)

        def numbered(i: int, step: Any = step, pool: list[Pair] = batches[seed]) -> Tensor:
            return step(i, pool[i % POOL])

        losses = torch.stack([numbered(i) for i in range(arguments.steps)])
        rows[name] = {
            "benchmark": "end_to_end",
            "case": arguments.case,
            "runner": name,
            "peak_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 2),
            "losses": [round(value, 4) for value in losses.tolist()],
        }
        steps[name] = numbered
        print(name, rows[name]["peak_gib"], losses[::20].tolist(), flush=True)
    # The steps of other seeds take as long as those of the first.
    times: dict[str, list[float]] = {name: [] for name in steps if name not in OTHER_SEEDS}
    for number, name in itertools.product(range(ROUNDS), times):
        times[name] += _timed(steps[name], arguments.steps + number * STEPS_PER_ROUND)
    _report(rows, times, case, arguments.out)


def _timed(step: Callable[[int], Tensor], first: int) -> list[float]:
    """Milliseconds of each step of a round, after one that is not counted."""
    step(first)
    return time_steps(lambda i: step(first + i), STEPS_PER_ROUND)


def _gap(a: list[float], b: list[float]) -> float:
    """The largest difference of two curves, each averaged over windows."""
    windows = range(0, len(a) - WINDOW + 1, WINDOW)
    return max(abs(sum(a[i : i + WINDOW]) - sum(b[i : i + WINDOW])) / WINDOW for i in windows)


def _report(rows: dict, times: dict[str, list[float]], case: Case, out: Path) -> None:
    machine, now = environment(DEVICE), datetime.datetime.now(datetime.UTC)
    table = Table(title=f"{rows['eager']['case']} on {machine['device']['name']}")
    for column in ("runner", "ms", "tokens/s", "peak GiB", "last loss", "gap to eager"):
        table.add_column(column)
    with out.open("a") as lines:
        for name, row in rows.items():
            if name in times:
                p20, p50, p80 = statistics.quantiles(times[name], n=10)[1::3]
                row |= {"step_ms": round(p50, 3), "p20_ms": round(p20, 3), "p80_ms": round(p80, 3)}
                row["tokens_per_second"] = round(1e3 * case.tokens_per_step / row["step_ms"])
            row["gap_to_eager"] = round(_gap(row["losses"], rows["eager"]["losses"]), 4)
            last = statistics.mean(row["losses"][-WINDOW:])
            measured = (row.get("step_ms", "-"), row.get("tokens_per_second", "-"))
            shown = (*measured, row["peak_gib"], round(last, 4), row["gap_to_eager"])
            table.add_row(name, *map(str, shown))
            stamp = {"time": now.isoformat(timespec="seconds"), "machine": machine}
            lines.write(json.dumps({**row, **stamp}) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
