"""Many tensors under one launch: cut into chunks, reached through tables of addresses.

A program looks up its chunk's tensor, and there the address; so one launch covers any number of
tensors of any size, dtype and group. Tables are built once; addresses that change, such as those of
fresh gradients, travel in one pinned copy that nobody waits for.
"""

import functools
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
import triton.language as tl
from torch import Tensor

from fastft_kernels.device import ceil_div

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# Of `array`, which takes many numbers faster than a tensor does.
CODES = {torch.int64: "q", torch.float32: "f"}
# Slots for numbers on the host; more than a host is steps ahead of its GPU.
_HALF = 16

get_grad: Any = attrgetter("grad")
get_dtype: Any = attrgetter("dtype")


def _on_host(values: Sequence, dtype: torch.dtype) -> Tensor:
    if dtype in CODES and len(values):
        return torch.frombuffer(array(CODES[dtype], values), dtype=dtype)
    return torch.tensor(values, dtype=dtype)


def upload(
    values: Sequence, dtype: torch.dtype, device: torch.device, into: Tensor | None = None
) -> Tensor:
    """Host numbers to the device, without waiting; into an existing tensor if given.

    The pinned buffer is fresh each time: the allocator keeps it until the copy has run, so a host
    that is steps ahead never overwrites what the GPU has yet to read.
    """
    host = _on_host(values, dtype)
    host = host.pin_memory() if device.type == "cuda" else host
    if into is not None:
        return into.copy_(host, non_blocking=True)
    return host.to(device, non_blocking=True, copy=True)


class HostNumbers:
    """float32 numbers in pinned memory of the host, where kernels read them without a copy.

    A copy of a few numbers takes the host longer than all else that it does to launch a kernel.
    Slots take turns, half of them at a time: a half is written again when the kernels that read it
    have ended. The allocator does not know of these, so it never gets the memory back.
    """

    _idle: ClassVar[defaultdict[tuple[int, torch.device], list[Tensor]]] = defaultdict(list)

    def __init__(self, count: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        # Every slot begins at an aligned address.
        width = ceil_div(count, 16) * 16
        idle = self._idle[width, device]
        slots = idle.pop() if idle else None
        if slots is None:
            slots = torch.zeros(2 * _HALF, width, device="cpu", pin_memory=on_gpu)
        elif on_gpu:
            torch.cuda.synchronize(device)
        weakref.finalize(self, idle.append, slots)
        self._device, self._at = device, 0
        self._slots = [slot[:count] for slot in slots]
        self._read = [torch.cuda.Event(), torch.cuda.Event()] if on_gpu else []

    def write(self, values: Sequence[float]) -> Tensor:
        """What kernels launched from now on are to read; no more of what was written before."""
        self._at = (self._at + 1) % (2 * _HALF)
        half, first = divmod(self._at, _HALF)
        if first == 0 and self._read:
            self._read[1 - half].record(torch.cuda.current_stream(self._device))
            self._read[half].synchronize()
        return self._slots[self._at].copy_(_on_host(values, torch.float32))


def _each(read: Callable[[Any], Any], tensors: Sequence[Tensor | None], missing: Any) -> list[Any]:
    """What is read of each tensor; fast where none is None."""
    try:
        return list(map(read, tensors))
    except (AttributeError, TypeError):
        return [missing if t is None else read(t) for t in tensors]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """`data_ptr` of each, 0 for None."""
    return _each(Tensor.data_ptr, tensors, 0)


@functools.lru_cache(maxsize=8)
def _numbers(count: int) -> list[int]:
    return list(range(count))


def are_at(tensors: list[Tensor | None], known: list[int]) -> bool:
    """Whether `addresses` of the tensors are the known ones."""
    if len(tensors) != len(known):
        return False
    compare: Any = torch._C._tensors_data_ptrs_at_indices_equal  # type: ignore[attr-defined]
    try:
        # Twice as fast as asking each tensor; it takes no None.
        return compare(tensors, known, _numbers(len(known)))
    except RuntimeError:
        return addresses(tensors) == known


def numels(tensors: Sequence[Tensor | None]) -> list[int]:
    """`numel` of each, 0 for None."""
    return _each(Tensor.numel, tensors, 0)


def dtypes(tensors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    """Of each, None for None."""
    return _each(get_dtype, tensors, None)


def is_dense(tensor: Tensor) -> bool:
    """True when the elements fill one stretch of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def memory_of(tensor: Tensor) -> Tensor:
    """The tensor, or an empty one of its shape that fills one stretch of memory."""
    if is_dense(tensor):
        return tensor
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


class ChunkTable:
    """Which tensor, and which part of it, every program works on.

    Attributes:
        tensor, index: int32 `[chunks]`: the chunk's tensor and its number within the tensor.
        counts: chunks per tensor, in the order of `order`.
        numel: int64 `[tensors]`.
    """

    def __init__(
        self,
        numels: Sequence[int],
        chunk: int,
        device: torch.device,
        order: Sequence[int] | None = None,
    ) -> None:
        order = range(len(numels)) if order is None else order
        permutation = torch.tensor(list(order), dtype=torch.int64)
        self.chunk = chunk
        self.counts = [ceil_div(numels[i], chunk) for i in order]
        counts = torch.tensor(self.counts, dtype=torch.int64)
        tensor = torch.repeat_interleave(permutation, counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        self.chunks = len(tensor)
        self.tensor = tensor.int().to(device)
        self.index = (torch.arange(self.chunks) - first).int().to(device)
        self.numel = torch.tensor(list(numels), dtype=torch.int64).to(device)


class Kinds:
    """The distinct (dtypes, alignment) among the tensors: one branch of the kernel for each.

    Attributes:
        names: what the kernel unrolls over: `((Triton dtype, ..., aligned), ...)`.
        index: int32 `[tensors]`, the kind of each.
    """

    def __init__(self, kinds: Sequence[tuple], device: torch.device) -> None:
        distinct = sorted(set(kinds), key=str)
        self.of = tuple(kinds)
        self.names = tuple(
            (*(TRITON_DTYPES[d] for d in kind[:-1]), bool(kind[-1])) for kind in distinct
        )
        number = {kind: i for i, kind in enumerate(distinct)}
        self.index = torch.tensor([number[k] for k in kinds], dtype=torch.int32).to(device)
