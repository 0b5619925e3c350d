"""Tries schedules of the kernels and records them all; `row_schedule` and `adam` hold the choice.

Kernels are compiled by a pool of processes first, because compiling takes longer than timing.
Norms are tried with weights in float32 and in bf16, at 2^28 elements (norm, and adaptive for the
adaptive one with a residual), and at 4,096 rows replayed from a CUDA graph (small).
Usage: python -m benchmarks.sweep OUT.jsonl [norm adaptive small adam gradient]
"""

import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from fastft_kernels import FusedAdam, GradientNorm, adam, gradient_norm
from fastft_kernels.adam import AdamSchedule
from fastft_kernels.row_schedule import Schedule

from benchmarks.timing import copy_bytes_per_us, time_device, time_replayed

ELEMENTS = 1 << 28
BYTES = {"fp32": 28, "bf16": 20, "8bit": 16 + 4 / 128}
Task = tuple[str, Any, Any]
# Columns, dtype of weight and bias, rows or None for 2^28 elements.
Variant = tuple[int, str, int | None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL_ROWS = 4096
COLUMNS = (512, 1024, 2048, 4096, 8192)
norms: Any = sys.modules["fastft_kernels.layer_norm"]
adaptive: Any = sys.modules["fastft_kernels.adaptive_norm"]
NORMS = {
    "forward": ("forward", norms),
    "backward": ("backward", norms),
    "adaptive forward": ("forward", adaptive),
    "adaptive backward": ("backward", adaptive),
}
SAMPLES = 4


def forward_candidates(columns: int, op: str) -> list[Schedule]:
    """A program per tile; for long rows passes over chunks of them, or persistent programs."""
    tiles = [t for t in (1024, 2048, 4096, 8192, 16384, 32768) if columns <= t <= 32 * columns]
    chosen = [Schedule(t // columns, w) for t in tiles for w in (1, 2, 4, 8, 16, 32) if _fits(t, w)]
    if op != "forward":
        tiles = [t for t in (2048, 4096, 8192) if columns <= t <= 8 * columns]
        chosen += [
            Schedule(t // columns, w, stages, programs)
            for t, w in itertools.product(tiles, (4, 8, 16))
            for stages, programs in ((2, 4), (3, 2), (3, 8), (4, 16))
            if _fits(t, w)
        ]
    elif columns >= 4096:
        pairs = itertools.product((4, 8, 16), (1024, 2048, 4096, 8192))
        chosen += [Schedule(1, w, chunk=chunk) for w, chunk in pairs if _fits(chunk, w)]
    return chosen


def backward_candidates(columns: int) -> list[Schedule]:
    """Persistent: few programs with many bytes in flight, or many with few."""
    settings = [(4096, 8, 4, 1), (4096, 8, 4, 2), (4096, 16, 4, 1), (4096, 16, 4, 2)]
    settings += [(8192, 8, 3, 1), (8192, 16, 3, 1), (8192, 16, 3, 2), (8192, 16, 4, 1)]
    settings += [(4096, 16, 5, 1), (4096, 8, 6, 1), (4096, 8, 3, 2), (4096, 8, 2, 3)]
    settings += [(4096, 4, 3, 2), (4096, 4, 4, 2), (8192, 16, 2, 1), (8192, 32, 3, 1)]
    settings += [(2048, 4, 4, 2), (2048, 4, 4, 3), (2048, 4, 6, 2), (2048, 8, 6, 1)]
    settings += [(2048, 8, 4, 2), (2048, 4, 3, 4), (4096, 8, 1, 4), (8192, 16, 1, 2)]
    return [Schedule(t // columns, w, s, n) for t, w, s, n in settings if t >= columns]


def _fits(tile: int, warps: int) -> bool:
    """8 to 64 elements per thread: 16-byte accesses, and no spilled registers."""
    return 8 <= tile // (32 * warps) <= 64


def run_norm(op: str, variant: Variant, schedule: Schedule, rows: int) -> Any:
    """A call of one direction under the given schedule."""
    columns, dtype, _ = variant
    direction, module = NORMS[op]
    setattr(module, f"{direction}_schedule", lambda *_, **__: schedule)
    if module is adaptive:
        return run_adaptive(direction, columns, DTYPES[dtype], rows)
    x = torch.randn(rows, columns, device="cuda").bfloat16()
    weight, bias = (torch.randn(columns, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    outputs = torch.ops.fastft.layer_norm_forward(x, None, weight, bias, 1e-5, x.dtype)
    if direction == "forward":
        return lambda: norms._launch_forward(x, None, weight, bias, 1e-5, outputs)
    dy = torch.randn(rows, columns, device="cuda").bfloat16()
    grads = norms._backward_fake(dy, None, x, weight, outputs[2], outputs[3], True)
    return lambda: norms._launch_backward(dy, None, x, weight, outputs[2], outputs[3], True, grads)


def run_adaptive(direction: str, columns: int, dtype: torch.dtype, rows: int) -> Any:
    """The same of the adaptive norm, with a residual."""
    shape = (SAMPLES, rows // SAMPLES, columns)
    x, residual, dy = (torch.randn(shape, device="cuda").bfloat16() for _ in range(3))
    scale, shift = (torch.randn(SAMPLES, columns, device="cuda").to(dtype) for _ in range(2))
    outputs = torch.ops.fastft.adaptive_norm_forward(x, scale, shift, residual, 1e-5, x.dtype)
    if direction == "forward":
        return lambda: adaptive._launch_forward(x, scale, shift, residual, 1e-5, outputs)
    kept = (x, scale, *outputs[1:])
    grads = adaptive._backward_fake(dy, *kept)
    return lambda: adaptive._launch_backward(dy, *kept, grads)


def adam_candidates() -> list[AdamSchedule]:
    """A tile per program, and short loops with prefetch."""
    settings = [(1024, 1024, 4, 1), (2048, 2048, 4, 1), (4096, 4096, 8, 1), (4096, 1024, 4, 1)]
    settings += [(4096, 1024, 4, 3), (8192, 2048, 8, 1), (16384, 4096, 8, 3)]
    return [AdamSchedule(*setting) for setting in settings]


def model_shapes(width: int = 1344, blocks: int = 55) -> list[tuple[int, ...]]:
    """668 tensors and 1.2e9 parameters: transformer blocks, an embedding, seven vectors."""
    d = width
    block = [(3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    block += [(d,)] * 4
    return block * blocks + [(4096, d)] + [(d,)] * 7


def make_params(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(s, device="cuda") * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def run_adam(layout: Any, schedule: AdamSchedule, params: list[torch.nn.Parameter]) -> Any:
    adam.SCHEDULES[layout] = schedule
    optimizer = FusedAdam(params, lr=1e-4, state_layout=layout)
    optimizer.step()
    return optimizer.step


def run_gradient(setting: tuple[int, int, int], params: list[torch.nn.Parameter]) -> Any:
    gradient_norm.CHUNK, gradient_norm.BLOCK, gradient_norm.WARPS = setting
    norm = GradientNorm(max_norm=1.0)
    grads = [p.grad for p in params]
    return lambda: norm(grads)


def compile_one(task: Task) -> None:
    name, variant, schedule = task
    with contextlib.suppress(triton.OutOfResources):
        if name in NORMS:
            run_norm(name, variant, schedule, rows=256)()
        else:
            run_many(task, make_params([(96, 1024)]))()
    torch.cuda.synchronize()


def run_many(task: Task, params: list[torch.nn.Parameter]) -> Any:
    name, variant, schedule = task
    if name == "adam":
        return run_adam(variant, schedule, params)
    return run_gradient(schedule, params)


def tasks(wanted: set[str]) -> list[Task]:
    found: list[Task] = []
    for part, rows in (("norm", None), ("small", SMALL_ROWS)):
        for n, dtype in itertools.product(COLUMNS, DTYPES) if part in wanted else ():
            found += [("forward", (n, dtype, rows), s) for s in forward_candidates(n, "forward")]
            if dtype == "fp32":
                found += [("backward", (n, dtype, rows), s) for s in backward_candidates(n)]
    for n in COLUMNS if "adaptive" in wanted else ():
        of, name = (n, "bf16", None), "adaptive forward"
        found += [(name, of, s) for s in forward_candidates(n, name)]
        found += [("adaptive backward", of, s) for s in backward_candidates(n)]
    if "adam" in wanted:
        pairs = itertools.product(("fp32", "bf16", "8bit"), adam_candidates())
        found += [("adam", *pair) for pair in pairs]
    if "gradient" in wanted:
        settings = itertools.product((16384, 65536, 131072), ((2048, 4), (4096, 8)))
        found += [("gradient", "fp32", (chunk, *rest)) for chunk, rest in settings]
    return found


def measure(task: Task, params: list[torch.nn.Parameter], copy: float) -> dict[str, Any]:
    """One record: device time and share of a copy."""
    name, variant, schedule = task
    if name in NORMS:
        columns, dtype, rows = variant
        bytes_each = 4 if name == "forward" else 6  # The adaptive one has a residual.
        moved = (rows or ELEMENTS // columns) * columns * bytes_each
        what = f"{name} {columns}, weights {dtype}, rows {rows or ELEMENTS // columns}"
        make = functools.partial(run_norm, *task, rows=rows or ELEMENTS // columns)
        if rows is None:
            p50 = time_device(make(), repeats=10, warmup=2).p50
        else:
            p50 = time_replayed(make, max(4, min(32, (256 << 20) // moved))).p50
    else:
        size = BYTES[variant] if name == "adam" else 4
        moved, what = size * sum(p.numel() for p in params), f"{name} {variant}"
        p50 = time_device(run_many(task, params), repeats=10, warmup=2).p50
    return {"what": what, "schedule": str(schedule), "p50_us": p50, "share": moved / p50 / copy}


def main() -> None:
    out, wanted = Path(sys.argv[1]), set(sys.argv[2:]) or {"norm", "adam", "gradient"}
    todo = tasks(wanted)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(14, mp_context=context) as pool:
        list(pool.map(compile_one, todo, chunksize=4))
    copy = copy_bytes_per_us()
    print(torch.cuda.get_device_name(), "copy TB/s", copy / 1e6, "tasks", len(todo), flush=True)
    params = make_params(model_shapes())
    results: dict[str, list[tuple[float, str]]] = {}
    with out.open("w") as file:
        for task in todo:
            try:
                record = measure(task, params, copy)
            except triton.OutOfResources as problem:
                print(task, problem)
                continue
            gc.collect()
            file.write(json.dumps(record) + "\n")
            results.setdefault(record["what"], []).append((record["share"], record["schedule"]))
    for what, found in results.items():
        print(what)
        for share, schedule in sorted(found, reverse=True)[:5]:
            print(f"  {share:.3f} {schedule}")


if __name__ == "__main__":
    main()
