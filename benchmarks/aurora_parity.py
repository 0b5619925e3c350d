"""Aurora's gradients and losses beside upstream's: how far each is from upstream in float32.

Usage: python -m benchmarks.aurora_parity OUT.jsonl [--size full small tiny] [--steps 20]
    [--modes bf16 ...] [--beside RECORDS.jsonl]

All start from the same random weights, the modulation of the Swin blocks among them, and see the
same random fields. A tensor's error is the norm of the difference over the norm of the float32
gradient. Losses are those of whole steps with AdamW at 1e-4. `--beside` takes upstream's errors
and losses from an earlier run's records, and runs upstream in float32 alone.
"""

import argparse
import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.aurora import MODES, SIZES, UpstreamStep, make_adapter, make_batches, make_task
from benchmarks.models import trainer_step
from benchmarks.training import CLIP, DEVICE
from fastft.blocks import RECOMPUTE
from fastft.config import OptimConfig, ScheduleConfig
from fastft.runtime import environment
from fastft.task import Batch

OPTIM = OptimConfig(lr=1e-4, weight_decay=0.05, schedule=ScheduleConfig(name="constant"))
SHARES = (0.5, 0.9, 1.0)
UPSTREAM = "upstream, bf16"


def upstream(size: str, autocast: bool) -> tuple[Callable[[Batch], Any], Any, Any]:
    """(loss and gradients, whole step, parameters by name)."""
    # Torch's default, which the recipe keeps; the truth does without.
    torch.backends.cudnn.allow_tf32 = autocast
    task = make_task(make_adapter(size), DEVICE)
    step = UpstreamStep(task, size, OPTIM, autocast)
    task.model.to("cpu")
    return step.gradients, step, step.parameters


def fastft(size: str, mode: str) -> tuple[Callable[[Batch], Any], Any, Any]:
    """As `upstream`."""
    options, settings = MODES[mode]
    task = make_task(make_adapter(size, **options), DEVICE)
    step, forwards = trainer_step(task, DEVICE, OPTIM, CLIP, compile="blocks", **settings)
    forwards.use_everywhere(RECOMPUTE)
    # That of the first step's loss in fp16.
    scale = 2.0**16 if settings["precision"] == "fp16" else 1.0

    def gradients(batch: Batch) -> None:
        with step.precision.autocast():
            loss = task.loss(task.model, batch)
        (scale * loss.total).backward()
        for parameter in task.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
        nn.utils.clip_grad_norm_(task.model.parameters(), CLIP)

    def run(batch: Batch) -> Tensor:
        return step(0, [batch]).loss

    return gradients, run, dict(task.model.named_parameters())


def take_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """On the host; dropped from the parameters."""
    found = {n: p.grad.to("cpu") for n, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def distances(truth: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each tensor, on the GPU, one at a time."""
    errors = {}
    for name, expected in truth.items():
        whole = expected.to(DEVICE, torch.float64)
        size = float(whole.norm())
        if size > 0:
            errors[name] = float((found[name].to(DEVICE).double() - whole).norm()) / size
    return errors


def quantiles(errors: dict[str, float]) -> dict[str, float]:
    """Of the tensors' errors."""
    values = torch.tensor(list(errors.values()), dtype=torch.float64)
    return {f"p{share:.0%}": float(values.quantile(share)) for share in SHARES}


def recorded(path: Path, steps: int) -> dict[str, Any]:
    """Upstream's errors and losses in bf16 from records."""
    rows = map(json.loads, path.read_text().splitlines())
    found = next((row for row in rows if row["runner"] == UPSTREAM), {})
    if "errors" not in found or len(found["losses"]) != steps:
        raise SystemExit(
            f"{path}: --beside needs a row '{UPSTREAM}' with the errors of all tensors and {steps}"
            " losses; give another, or --steps as it has, or leave --beside out"
        )
    return found


def main() -> None:
    """Float32 first, then each run's gradients and losses."""
    parser = argparse.ArgumentParser(description="Aurora's gradients beside upstream's.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["bf16"])
    parser.add_argument("--beside", type=Path)
    arguments = parser.parse_args()
    theirs = recorded(arguments.beside, arguments.steps) if arguments.beside else {}
    batches = make_batches(make_adapter(arguments.size), arguments.size, DEVICE)
    gradients, step, parameters = upstream(arguments.size, autocast=False)
    gradients(batches[0])
    truth = take_gradients(parameters)
    del gradients, step, parameters
    table = Table("run", "median", "90 %", "most", "beyond 1.25 x", "loss, first", "last", "apart")
    for mode in (*(() if theirs else (None,)), *arguments.modes):
        name = f"fastft, {mode}" if mode else UPSTREAM
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        made = fastft(arguments.size, mode) if mode else upstream(arguments.size, autocast=True)
        gradients, step, parameters = made
        gradients(batches[0])
        errors = distances(truth, take_gradients(parameters))
        # Read when all are done, so that the host stays ahead.
        held = [step(batches[i % len(batches)]) for i in range(arguments.steps)]
        losses = [float(loss) for loss in held]
        theirs = theirs or {"errors": errors, "losses": losses}
        worse = [n for n, e in theirs["errors"].items() if errors[n] > 1.25 * e]
        pairs = zip(losses, theirs["losses"], strict=True)
        apart = max((abs(a - b) / b for a, b in pairs), default=0.0)
        row = {
            "benchmark": "aurora_parity",
            "size": arguments.size,
            "runner": name,
            **quantiles(errors),
            "tensors": len(errors),
            "errors": errors,
            "beyond": worse,
            "losses": losses,
            "apart": apart,
            "machine": environment(DEVICE),
        }
        with arguments.out.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        ends = (losses[0], losses[-1]) if losses else (0.0, 0.0)
        shown = [f"{value:.4g}" for value in quantiles(errors).values()]
        table.add_row(name, *shown, str(len(worse)), *(f"{v:.5f}" for v in ends), f"{apart:.2e}")
        print(name, *shown, len(worse), *ends, apart, flush=True)
        del gradients, step, parameters, made
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
