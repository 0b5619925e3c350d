"""The capture itself: the one place that calls CUDA."""

import contextlib
import functools
import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft.task import Loss

TOO_LITTLE_MEMORY = "there is too little memory for it beside the uncaptured step"
_WARM_UP = 2

# Losses of the micro-batches, and gradients of the parameters.
Outputs = tuple[Sequence[Loss], list[Tensor | None]]
Run = Callable[[], Outputs]
# What repeats a call into the same outputs, and these.
Recorded = tuple[Callable[[], object], Outputs]
# Captures a call. Raises CaptureFailed.
Record = Callable[[Run, torch.device], Recorded]


class NotCaptured(Exception):
    """Why a step cannot be captured."""


class CaptureFailed(NotCaptured):
    """Likewise, found out in the attempt, which spoils what was captured before (`_abandon`)."""


def make_record_on_gpu(device: torch.device) -> Record:
    """Captures calls in CUDA graphs that share memory, so that it does not grow with their number.

    What one of them leaves may be overwritten when any of them is replayed: a graph may compute
    where a later one has its outputs. Read them before that, on the same stream.
    """
    # A pool's memory goes to another graph on the same stream only.
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    return functools.partial(_record_on_gpu, stream=stream, pool=pool)


def _record_on_gpu(
    run: Run, device: torch.device, *, stream: torch.cuda.Stream, pool: Any
) -> Recorded:
    """Captures a call in a CUDA graph.

    Raises:
        CaptureFailed: the call waits for the GPU, or CUDA refuses.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    outputs = reason = None
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()
            with _waiting_forbidden():
                run()
        torch.cuda.synchronize(device)
        # cuBLAS makes its workspace anew in the graph's memory, which lives as long as the graph.
        torch._C._cuda_clearCublasWorkspaces()
        # What is destroyed in the middle of a capture may end it.
        gc.collect()
        # Other threads may pin memory meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            outputs = run()
        torch._C._cuda_clearCublasWorkspaces()
    except torch.OutOfMemoryError:
        reason = TOO_LITTLE_MEMORY
    except Exception as error:
        # Where the end of the capture fails as well, its error hides the first one.
        first = error.__context__ or error
        reason = f"it cannot be captured: {explain(first)}"
        if isinstance(first, torch.OutOfMemoryError):
            reason = TOO_LITTLE_MEMORY
    # Past the handlers, because the error's frames hold activations.
    if outputs is None or reason is not None:
        outputs = None
        _abandon(device, pool, before)
        raise CaptureFailed(reason)
    return graph.replay, outputs


def explain(error: BaseException) -> str:
    """The first line of what an error says, and the innermost line of code that is not torch's."""
    own = (str(Path(torch.__file__).parent), __file__, "<")
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(own)]
    text = (str(error) or repr(error)).splitlines()[0]
    if not outside:
        return text
    path = Path(outside[-1].filename)
    roots = [root for root in map(Path, sys.path) if root.is_absolute() and root in path.parents]
    # As it is imported.
    path = path.relative_to(max(roots, key=lambda root: len(root.parts))) if roots else path
    return f"{text} ({path}:{outside[-1].lineno}, {outside[-1].line})"


def _abandon(device: torch.device, pool: Any, before: torch.cuda.Stream) -> None:
    """Where a capture fails, torch 2.11 leaves stream, allocator and generator in the middle of it.

    After that no random numbers could be drawn, and no cached memory given back. Graphs that were
    captured before draw from the old generator's state, and what the pool took stays with them.
    """
    torch.cuda.set_stream(before)
    index = torch.cuda.current_device() if device.index is None else device.index
    # It refuses where the allocator is not in the middle of a capture.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    torch._C._cuda_clearCublasWorkspaces()
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


@contextlib.contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Makes a wait an error that breaks nothing; in the middle of a capture it would."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
