"""The training step on a GPU: time, memory, and calls by which the host waits for the device.

    python benchmarks/step.py [--out benchmarks/results/FILE.jsonl]

A timm ViT-B/16 classifier at 224 x 224, batch 64, random images, AdamW, clipping, through the same
assembly as `fastft train`. One row per precision and compile mode; the loss of every row is that of
the same steps on the same data. Waits are counted in a profile of the steps between two log points.
"""

import argparse
import dataclasses
import datetime
import io
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastft.assemble import assemble, build_step
from fastft.config import RunConfig
from fastft.data import open_loader
from fastft.finetune import set_train_mode
from fastft.runfile import parse
from fastft.runtime import environment, seed_everything
from fastft.step import TrainingStep
from fastft.task import Batch

DEVICE = torch.device("cuda", 0)
ROWS = [("fp32", "off"), ("tf32", "off"), ("bf16", "off"), ("fp16", "off")] + [
    (precision, "blocks") for precision in ("tf32", "bf16", "fp16")
]
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def make_config(folder: Path) -> RunConfig:
    """ViT-B/16 on 256 random images of ten classes."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(256, 3, 224, 224)).astype(np.float32)
    np.savez(folder / "train.npz", inputs=images, targets=rng.integers(0, 10, 256))
    options = {"name": "vit_base_patch16_224", "num_classes": 10}
    tree = {
        "run": {"folder": str(folder / "run"), "steps": 1000},
        "model": {"adapter": "timm", "options": options},
        "data": {"train": [{"path": str(folder / "train.npz")}], "batch_size": 64, "workers": 4},
        "loss": {"terms": [{"name": "cross_entropy"}]},
        "optim": {"lr": 1e-4, "weight_decay": 0.05},
        "gradients": {"clip_norm": 1.0},
    }
    return parse(RunConfig, tree, where="benchmark")


def make_step(config: RunConfig, precision: str, mode: str) -> tuple[TrainingStep, list[Batch]]:
    """The step, and the batches of the first four steps on the device."""
    seed_everything(0)
    settings = dataclasses.replace(config.step, precision=precision, compile=mode)
    config = dataclasses.replace(config, step=settings)
    quiet = Console(file=io.StringIO())
    task, adapter = assemble(config, DEVICE, quiet)
    step, _ = build_step(config, task, DEVICE, quiet)
    set_train_mode(task.model, "full")
    with open_loader(adapter, config.data, seed=0, device=DEVICE) as loader:
        batches = [batch.to(DEVICE) for batch, _ in zip(loader.batches(), range(4), strict=False)]
    return step, batches


def measure(config: RunConfig, precision: str, mode: str) -> dict[str, object]:
    """Times 20 steps after 10, then profiles 5."""
    step, batches = make_step(config, precision, mode)
    torch.cuda.reset_peak_memory_stats()
    losses = [step(i, [batches[i % 4]]).loss for i in range(10)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    marks[0].record()
    for i in range(20):
        losses.append(step(10 + i, [batches[i % 4]]).loss)
        marks[i + 1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    with torch.profiler.profile() as profile, torch.profiler.record_function("steps"):
        for i in range(5):
            step(30 + i, [batches[i % 4]])
    events = profile.events() or []
    window = next(event for event in events if event.name == "steps").time_range
    inside = [e.name for e in events if window.start <= e.time_range.start <= window.end]
    return {
        "benchmark": "step",
        "precision": precision,
        "compile": mode,
        "step_ms": round(statistics.median(times), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "launches": sum("LaunchKernel" in name for name in inside) / 5,
        "waits": sum(name in WAITS or "DtoH" in name for name in inside),
        "loss_first": losses[0].item(),
        "loss_30": losses[-1].item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the training step on a GPU.")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder))
        rows = [measure(config, *row) for row in ROWS]
    machine = environment(DEVICE)
    table = Table(title=f"Training step of ViT-B/16, batch 64, {machine['device']['name']}")
    columns = [name for name in rows[0] if name != "benchmark"]
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    Console(width=120).print(table)
    if out is not None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with out.open("a") as lines:
            for row in rows:
                lines.write(json.dumps({**row, "time": now, "machine": machine}) + "\n")


if __name__ == "__main__":
    main()
