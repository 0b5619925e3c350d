"""Seconds until the first step of a 24-block model, with an empty and with a full compile cache.

Usage: python -m benchmarks.compile_time OUT.jsonl [vit-l gpt-2k]

Each run is a process of its own, since a process keeps what it has compiled.
"""

import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.models import classifier_batch, trainer_step
from benchmarks.training import CASES, CLIP, DEVICE, OPTIM, PRECISION
from fastft.runtime import environment


def first_step(name: str) -> dict[str, float]:
    """Seconds of building the step and taking it once, and of taking it again."""
    case = CASES[name]()
    task, (pair, *_) = case.task(), case.make_batches()
    batches = [classifier_batch(pair)]
    torch.cuda.synchronize()
    marks = [time.perf_counter()]
    step, _ = trainer_step(task, DEVICE, OPTIM, CLIP, precision=PRECISION, compile=case.compile)
    for i in range(3):
        step(i, batches)
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
    first, second, third = (b - a for a, b in itertools.pairwise(marks))
    return {"first_s": round(first, 2), "second_s": round(second, 2), "third_s": round(third, 2)}


def main() -> None:
    """Twice in a fresh process with one cache folder."""
    out, names = Path(sys.argv[1]), sys.argv[2:] or ["vit-l", "gpt-2k"]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
            for cache in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.compile_time", "--child", name]
                ran = subprocess.run(
                    command, env={**os.environ, **caches}, stdout=subprocess.PIPE, check=True
                )
                row = {"benchmark": "compile_time", "case": name, "cache": cache}
                row |= json.loads(ran.stdout.splitlines()[-1])
                print(row, flush=True)
                with out.open("a") as lines:
                    stamp = {"time": now, "machine": environment(DEVICE)}
                    lines.write(json.dumps({**row, **stamp}) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps(first_step(sys.argv[2])))
    else:
        main()
