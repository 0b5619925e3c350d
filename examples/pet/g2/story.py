"""Pretrains on the old level of theory, and learns the new one in five ways from few structures.

Does what the README types, for several numbers of structures and two draws of them. A run's folder
is `runs/g2/WAY-NUMBER-DRAW`, with its output beside it. `report.py` makes a table of them.
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastft.cli import main as fastft

HERE = Path(__file__).parent
FOLDER = Path("runs/g2")
# Structures of the new level. Draws are disjoint parts of its file, and seeds.
NUMBERS, DRAWS = (16, 64, 256), (0, 1)
_INHERIT = "model.options.inherit_heads=energy"
# Way -> run file and overrides.
WAYS: dict[str, Sequence[str]] = {
    "scratch": ("scratch.toml",),
    "full": ("tune.toml",),
    "heads": ("tune.toml", "finetune.method=heads", "model.options.keep_targets=true", _INHERIT),
    "inherit_heads": ("tune.toml", _INHERIT, "optim.lr=3e-4"),
    "multi-fidelity": ("multi-fidelity.toml",),
}


def tell(numbers: Sequence[int] = NUMBERS, more: Sequence[str] = ()) -> None:
    """Runs everything; what earlier runs left is removed first.

    Args:
        numbers: of structures of the new level.
        more: overrides for every run.
    """
    if not (FOLDER / "data").is_dir():
        sys.exit(f"{FOLDER}/data: must hold the structures; got no such folder; run label.py first")
    seconds: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], None]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        seconds[name] = [time.perf_counter() - wall, time.process_time() - cpu]
        print(f"{name}: {seconds[name][0]:.1f} s", flush=True)

    def pretrain() -> None:
        run("pretrain", "pretrain.toml", *more)
        export = ("export", *_arguments("pretrain", "pretrain.toml", *more))
        path = FOLDER / "pretrained.ckpt"
        path.unlink(missing_ok=True)
        _call("export", *export, "--to", str(path))

    timed("pretrain", pretrain)
    for number in numbers:
        for draw in DRAWS:
            frames = f"{draw * number}:{(draw + 1) * number}"
            drawn = (f"data.train.0.options.frames={frames}", f"run.seed={draw}")
            for way, settings in WAYS.items():
                name = f"{way}-{number}-{draw}"
                timed(name, lambda name=name, all_=(*settings, *drawn, *more): run(name, *all_))
    (FOLDER / "seconds.json").write_text(json.dumps(seconds) + "\n")


def run(name: str, file: str, *overrides: str) -> None:
    """Trains, which scores on molecules of the old level alone at the end; scores on the others."""
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    arguments = _arguments(name, file, *overrides)
    _call(name, "train", *arguments)
    _call(f"{name}-test", "evaluate", *arguments, "--split", "test")


def _arguments(name: str, file: str, *overrides: str) -> list[str]:
    return [str(HERE / file), f"run.folder={FOLDER / name}", *overrides]


def _call(name: str, *arguments: str) -> None:
    """A command of fastft's in this process, since to import everything takes as long as to run."""
    path = FOLDER / f"{name}.log"
    with path.open("w") as log, contextlib.redirect_stdout(log):
        code = fastft(arguments)
    if code:
        sys.exit(f"{name}: fastft ended with code {code}; see {path}")


if __name__ == "__main__":
    # The tensors are too small to share.
    torch.set_num_threads(1)
    tell()
