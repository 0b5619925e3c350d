"""The curve of allocated memory."""

import torch
from torch import nn

from fastft.config import OptimConfig
from fastft.optim import Group, Optimizer
from fastft.profiling.memory import CURVE_POINTS, kept_bytes, memory_report


def event(action: str, size: int, time_us: int) -> dict[str, object]:
    return {"action": action, "size": size, "time_us": time_us, "addr": 0, "stream": 0}


def test_curve_adds_up_what_is_handed_out() -> None:
    events = [
        event("segment_alloc", 1_000_000, 500),
        event("alloc", 100, 1000),
        event("alloc", 300, 2000),
        event("free_requested", 100, 2500),
        # The same block, once the streams that used it are done.
        event("free_completed", 100, 2600),
        event("free_requested", 300, 5000),
    ]
    report = memory_report(events, 1000, {"weights": 600}, gradients=200)
    assert report.curve == ((0.0, 1000), (0.0, 1100), (1.0, 1400), (1.5, 1300), (4.0, 1000))
    assert (report.peak, report.start) == (1400, 1000)
    assert report.kept == {"weights": 600}


def test_thinning_keeps_peak_and_end() -> None:
    events = [event("alloc", 1, time) for time in range(5000)]
    events[3000] = event("alloc", 10_000, 3000)
    events[3001] = event("free_requested", 10_000, 3001)
    report = memory_report(events, 0, {}, gradients=0)
    assert len(report.curve) <= CURVE_POINTS
    assert max(size for _, size in report.curve) == report.peak == 13_000
    assert report.curve[-1] == (4.999, 4998)


def test_no_event_leaves_a_flat_curve() -> None:
    assert memory_report([], 7, {}, gradients=0).curve == ((0.0, 7),)


def test_kept_counts_shared_storage_once() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
    )
    weight = nn.Parameter(torch.ones(4, 4))
    model[0].weight = model[1].weight = weight
    model[2].requires_grad_(False)
    group = Group("default", {"0.weight": weight}, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999))
    optimizer = Optimizer([group], OptimConfig(name="adamw", lr=1e-3), total_steps=2)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.update(0, torch.ones(()), torch.zeros(()))
    kept, gradients = kept_bytes(model, optimizer, torch.device("cpu"))
    # 16 weights; batch norm's weight, bias, mean and variance, and a 64-bit counter.
    assert kept["weights"] == 4 * (16 + 4 * 4) + 8
    # Two moments, and the step counter.
    assert kept["optimizer state"] == 2 * 4 * 16 + 4
    assert gradients == 4 * 16
