"""Pretrains on handwritten digits 0-4, fine-tunes on digits 5-9, and shows what each way reaches.

Run by `scripts/quickstart`; everything it writes is under `runs/quickstart`. The digits are
scikit-learn's `load_digits`: 1,797 real images of 8 x 8 pixels (E. Alpaydin, C. Kaynak, UCI 1998).
"""

import datetime
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from fastft.config import RunConfig
from fastft.evaluate import evaluate, export
from fastft.precision import make_precision
from fastft.runfile import read_run_file
from fastft.runtime import environment, find_device
from fastft.train import train

FOLDER = Path("runs/quickstart")
HERE = Path(__file__).parent
PRETRAINED = FOLDER / "pretrained.safetensors"


def write_data(folder: Path) -> None:
    """Digits 0-4 and 5-9, a quarter of each held out, as .npz files."""
    pixels, digits = load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 8, 8)
    folder.mkdir(parents=True)
    for first in (0, 5):
        chosen = np.flatnonzero((digits >= first) & (digits < first + 5))
        chosen = np.random.default_rng(0).permutation(chosen)
        held_out = len(chosen) // 4
        for split, indices in (("validation", chosen[:held_out]), ("train", chosen[held_out:])):
            np.savez(
                folder / f"digits-{first}-{first + 4}-{split}.npz",
                inputs=images[indices],
                targets=digits[indices] - first,
            )


# What was done, accuracy, seconds.
Row = tuple[str, float, float]


def run_all(finetuning: RunConfig, console: Console) -> list[Row]:
    """Pretrains, then fine-tunes as a probe and in full."""
    pretraining = read_run_file(HERE / "pretrain.toml")
    probing = read_run_file(
        HERE / "finetune.toml",
        ["finetune.method=probe", f"run.folder={FOLDER / 'probe'}", "optim.groups=[]"],
    )

    def timed(title: str, action: Callable[[], dict[str, float]]) -> Row:
        console.rule(title)
        began = time.perf_counter()
        accuracy = action()["accuracy"]
        return title, accuracy, time.perf_counter() - began

    def trained(config: RunConfig) -> dict[str, float]:
        train(config, console)
        return evaluate(config, console)

    timed("pretraining on digits 0-4", lambda: trained(pretraining))
    export(pretraining, console, PRETRAINED)
    return [
        timed(
            "before fine-tuning",
            lambda: evaluate(finetuning, console, checkpoint=str(PRETRAINED)),
        ),
        timed("linear probe", lambda: trained(probing)),
        timed("full fine-tuning", lambda: trained(finetuning)),
    ]


def write_record(finetuning: RunConfig, rows: list[Row], total_seconds: float) -> None:
    """The table and the machine as `result.json`."""
    device = find_device(finetuning.run.device)
    record = {
        "benchmark": "quickstart",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "precision": make_precision(finetuning.step.precision, device).name,
        "rows": {title: {"accuracy": a, "seconds": round(s, 2)} for title, a, s in rows},
        "total_seconds": round(total_seconds, 2),
        "machine": environment(device),
    }
    (FOLDER / "result.json").write_text(json.dumps(record) + "\n")


def main() -> None:
    console = Console()
    began = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_data(FOLDER / "data")
    finetuning = read_run_file(HERE / "finetune.toml")
    rows = run_all(finetuning, console)
    table = Table(title="Held-out accuracy on digits 5-9")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("seconds", justify="right")
    for title, accuracy, seconds in rows:
        table.add_row(title, f"{accuracy:.3f}", f"{seconds:.1f}")
    console.print(table)
    write_record(finetuning, rows, time.perf_counter() - began)
    exported = FOLDER / "finetuned.safetensors"
    export(finetuning, console, exported)
    for line in (
        f"TensorBoard logs: tensorboard --logdir {FOLDER}",
        f"checkpoint: {finetuning.run.folder / 'checkpoints'}",
        f"exported: {exported}, for timm.create_model(..., checkpoint_path=...)",
        f"this table: {FOLDER / 'result.json'}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
