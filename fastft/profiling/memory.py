"""The memory of one step, from the events of torch's allocator."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.optim import Optimizer
from fastft.profiling.report import MemoryReport

# Points of the curve: more than a screen has room for would only make the page slow.
CURVE_POINTS = 400


def memory_report(
    events: Sequence[Mapping[str, Any]], start: int, kept: Mapping[str, int], gradients: int
) -> MemoryReport:
    """The curve that the allocator's events describe.

    Args:
        events: a device's entry of `torch.cuda.memory._snapshot()['device_traces']`: 'action',
            'size' in bytes and 'time_us', in the order in which they happened.
        start: bytes handed out before the first event.
        kept: what is there in every step -> bytes.
        gradients: bytes of all of them.
    """
    allocated, began = start, None
    points: list[tuple[float, int]] = [(0.0, start)]
    for event in events:
        # A freed block counts from the request: the allocator hands it out again in stream order.
        sign = {"alloc": 1, "free_requested": -1}.get(event["action"], 0)
        if not sign:
            continue
        began = event["time_us"] if began is None else began
        allocated += sign * event["size"]
        points.append(((event["time_us"] - began) / 1e3, allocated))
    peak = max(size for _, size in points)
    return MemoryReport(tuple(_thinned(points)), peak, start, dict(kept), gradients)


def _thinned(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most `CURVE_POINTS`, evenly in time: of each stretch the largest, and the last of all."""
    if len(points) <= CURVE_POINTS:
        return list(points)
    span = max(points[-1][0], 1e-9)
    largest: dict[int, tuple[float, int]] = {}
    for point in points:
        stretch = int(point[0] / span * (CURVE_POINTS - 2))
        if stretch not in largest or point[1] > largest[stretch][1]:
            largest[stretch] = point
    return [*largest.values(), points[-1]]


def kept_bytes(
    model: nn.Module, optimizer: Optimizer, device: torch.device
) -> tuple[dict[str, int], int]:
    """What stays on the device from step to step, and the size of all gradients."""
    states = (value for state in optimizer.state_dict().values() for value in state.values())
    kept = {
        "weights": _bytes([*model.parameters(), *model.buffers()], device),
        "optimizer state": _bytes((s for s in states if isinstance(s, Tensor)), device),
    }
    trained = (p for p in optimizer.parameters.values() if p.requires_grad)
    return kept, sum(p.numel() * p.element_size() for p in trained)


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of distinct storages: views of one storage count once."""
    storages = (t.untyped_storage() for t in tensors if t.device == device)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
