"""Times the catalog's ops, attention, Adam and the gradient norm, beside their peers.

Usage: python -m benchmarks.kernels OUT.jsonl [norms small attention swin adam gradient]
    [--ops layer_norm ...] [--columns 8192 ...] [--search]
"""

import argparse
import datetime
import functools
import gc
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import triton
from fastft_kernels import FusedAdam, GradientNorm
from fastft_kernels.adam_plan import StateLayout
from fastft_kernels.catalog import CATALOG, OpCase, as_tuple, values_and_grads

from benchmarks.adam_peers import LIMIT, adam_is_right, adam_peers, grouped
from benchmarks.attention import aurora_cases, bench_attention, swin_cases
from benchmarks.norm_peers import FROM_TORCH, providers
from benchmarks.sweep import BYTES, COLUMNS, ELEMENTS, make_params, model_shapes
from benchmarks.timing import Timing, copy_bytes_per_us, time_device, time_host, time_replayed

SMALL_ROWS = 4096
SAMPLES = 16
Function = Callable[..., Any]


class Records:
    """Writes one JSON line per measurement and says it aloud."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.copy = copy_bytes_per_us()
        self.common = {
            "device": torch.cuda.get_device_name(),
            "copy_tb_per_s": round(self.copy / 1e6, 3),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
            "timing": "slept",
        }
        print(self.common, flush=True)

    def add(self, what: dict[str, Any], timing: Timing, moved: float, **more: Any) -> None:
        """moved: bytes that the op must move, each tensor once."""
        times = {"p20_us": timing.p20, "p50_us": timing.p50, "p80_us": timing.p80}
        share = moved / timing.p50 / self.copy
        record = {**what, **times, "moved_bytes": moved, "share": round(share, 4), **more}
        self.file.write(json.dumps({**record, **self.common}) + "\n")
        self.file.flush()
        shown = " ".join(str(v) for v in what.values())
        extra = " ".join(f"{k}={v:.4g}" for k, v in more.items())
        print(f"{shown:58s} {timing.p50:10.1f} us  share {share:.3f}  {extra}", flush=True)


def norm_is_right(
    case: OpCase, function: Function, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> bool:
    """Whether the error against float64 is at most twice the eager one, plus rounding."""
    inputs = make_inputs(case, dtype, shape)
    grads = [torch.randn_like(y, dtype=torch.float32) for y in as_tuple(function(*inputs))]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    truths = values_and_grads(case.reference, doubles, grads)
    eager, found = (values_and_grads(f, inputs, grads) for f in (case.reference, function))
    for got, plain, truth in zip(found, eager, truths, strict=True):
        allowed = 2 * (plain - truth).norm() + 2.0**-8 * truth.norm()
        if not (got - truth).norm() <= allowed:
            return False
    return True


def make_inputs(case: OpCase, dtype: torch.dtype | None, shape: tuple[int, ...]) -> list[Any]:
    inputs = case.make_inputs(shape, torch.bfloat16, torch.device("cuda"))
    return [x if dtype is None else x.detach().to(dtype).requires_grad_() for x in inputs]


def norm_call(case: OpCase, function: Function, dtype: Any, shape: Any, direction: str) -> Any:
    """Nothing but the op's own launches, on fresh random inputs."""
    inputs = make_inputs(case, dtype, shape)
    if direction == "forward":
        return lambda: function(*inputs)
    outputs = as_tuple(function(*inputs))
    grads = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def bench_norms(
    records: Records, rows: int | None, ops: Sequence[str], widths: Sequence[int], search: bool
) -> None:
    """Large: 2^28 elements. Small: a micro-batch of `rows` rows, replayed from a CUDA graph."""
    for case, columns in itertools.product(CATALOG, widths):
        if case.name not in ops or (rows is not None and case.name != "layer_norm"):
            continue
        total = rows or ELEMENTS // columns
        shape = (SAMPLES, total // SAMPLES, columns)
        torch._dynamo.reset()
        for name, function, dtype in providers(case, columns, search=search):
            if name not in FROM_TORCH and not norm_is_right(case, function, dtype, shape):
                message = f"{case.name}, {name}: wrong at N = {columns}; not timed"
                if function is case.op:
                    raise SystemExit(message)
                print(message, flush=True)
                continue
            for direction in ("forward", "backward"):
                count = case.forward_tensors if direction == "forward" else case.backward_tensors
                moved = 2 * count * total * columns
                what = {"op": case.name, "rows": total, "columns": columns}
                what |= {"direction": direction, "provider": name}
                make = functools.partial(norm_call, case, function, dtype, shape, direction)
                if rows is None:
                    call = make()
                    records.add(what, time_device(call), moved, host_us=time_host(call))
                    del call
                else:
                    sets = max(4, min(32, (256 << 20) // moved))
                    records.add(what, time_replayed(make, sets), moved)
                gc.collect()


def bench_adam(records: Records) -> None:
    params = make_params(model_shapes())
    size = sum(p.numel() for p in params)
    settings: list[tuple[StateLayout, int]] = [
        ("fp32", 1),
        ("fp32", 28),
        ("fp32", 300),
        ("bf16", 1),
        ("8bit", 1),
    ]
    for layout in LIMIT:
        if not adam_is_right(functools.partial(FusedAdam, state_layout=layout), layout):
            raise SystemExit(f"adam, {layout} state: wrong; not timed")
    for monitor, (layout, count) in [(False, s) for s in settings] + [(True, ("fp32", 1))]:
        optimizer: Any = FusedAdam(grouped(params, count), state_layout=layout, monitor=monitor)

        def schedule(groups: Any = optimizer.param_groups) -> None:
            for group in groups:
                group["lr"] *= 0.999

        def step(optimizer: Any = optimizer, schedule: Any = schedule) -> None:
            schedule()
            optimizer.step()

        what = {"op": "adam", "state": layout, "groups": count, "monitor": monitor}
        step()
        state = [t for s in optimizer.state.values() for t in s.values()]
        host = time_host(optimizer.step, repeats=101, before=schedule)
        more = {"host_us": host, "state_bytes": sum(t.nbytes for t in state) / size}
        moved = BYTES[layout] * size
        records.add({**what, "provider": "fastft"}, time_device(step), moved, **more)
        del optimizer, schedule, step, state
        gc.collect()
    for name, layout, count, make in adam_peers():
        if not adam_is_right(make, layout):
            print(f"adam, {layout} state, {name}: wrong; not timed", flush=True)
            continue
        plain = make(grouped(params, count))
        what = {"op": "adam", "state": layout, "groups": count, "monitor": False}
        timing = time_device(plain.step, repeats=10, warmup=2)
        host = time_host(plain.step, repeats=5)
        records.add({**what, "provider": name}, timing, BYTES[layout] * size, host_us=host)
        del plain
        gc.collect()


def bench_gradient(records: Records) -> None:
    params = make_params(model_shapes())
    grads: list[Any] = [p.grad for p in params]
    size = sum(p.numel() for p in params)
    norm, groups = GradientNorm(max_norm=1.0), GradientNorm([i % 28 for i in range(len(params))])
    truth = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    if abs(norm(grads).global_norm.double() / truth - 1) > 1e-6:
        raise SystemExit("gradient_norm: wrong; not timed")
    total = torch.nn.utils.get_total_norm
    for provider, call in (
        ("fastft", lambda: norm(grads)),
        ("fastft 28 groups", lambda: groups(grads)),
        ("torch get_total_norm", lambda: total(grads)),
    ):
        what = {"op": "gradient_norm", "provider": provider}
        records.add(what, time_device(call), 4 * size, host_us=time_host(call))
    ours, plain = FusedAdam(params, lr=1e-4), torch.optim.AdamW(params, lr=1e-4, fused=True)

    def fused() -> None:
        result = norm(grads)
        ours.step(grad_divisor=result.grad_divisor, skip=result.skip)

    def eager() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        plain.step()

    for provider, call in (("fastft", fused), ("torch clip_grad_norm_ + fused", eager)):
        what = {"op": "norm + clip + adam", "provider": provider}
        host = time_host(call)
        timing = time_device(call)
        floor = timing.p50 / (32 * size / records.copy)
        records.add(what, timing, 32 * size, host_us=host, times_floor=floor)


def main() -> None:
    """Each part frees its tensors before the next begins."""
    names = [case.name for case in CATALOG]
    parser = argparse.ArgumentParser(description="Times the kernels beside their peers.")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "parts", nargs="*", metavar="part", help="norms, small, attention, swin, adam, gradient"
    )
    parser.add_argument("--ops", nargs="*", choices=names, default=names, help="of the norms")
    parser.add_argument("--columns", nargs="*", type=int, default=COLUMNS, help="of the norms")
    parser.add_argument("--search", action="store_true", help="quack's schedules, for minutes")
    arguments = parser.parse_args()
    chosen = arguments.ops, arguments.columns, arguments.search
    parts: dict[str, Callable[[Records], None]] = {
        "adam": bench_adam,
        "attention": lambda records: bench_attention(records, aurora_cases()),
        "swin": lambda records: bench_attention(records, swin_cases()),
        "gradient": bench_gradient,
        "small": lambda records: bench_norms(records, SMALL_ROWS, *chosen),
        "norms": lambda records: bench_norms(records, None, *chosen),
    }
    wanted = set(arguments.parts) or set(parts)
    if not wanted <= parts.keys():
        parser.error(f"parts: must be among {', '.join(parts)}")
    with arguments.out.open("w") as file:
        records = Records(file)
        for name, part in parts.items():
            if name in wanted:
                part(records)
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
