"""What autograd saves for the backward pass, kept on the host until then.

While a block runs, hooks of autograd see each tensor that is saved. Large ones are copied to pinned
memory by a stream beside the main one, and given up when the block has run. In the backward pass
the first tensor that a block asks for fetches all of its, and begins to fetch those of the block
that ran before it. So the device holds the saved tensors of two blocks at most, and the link works
while the device computes. The host waits for nothing.

Without a GPU the same happens by plain copies.
"""

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastft.errors import PlanError

# Below this, a copy costs more of the host's time than it saves memory.
_LEAST_BYTES = 2**20
# Of the memory that the host has free.
_SHARE = 0.5


class HostMemoryError(PlanError):
    """More is to wait on the host than it has memory for."""


class Host:
    """Pinned memory and the stream that copies to it and back, for all blocks of a run.

    Every copy is made by that stream, in order: a buffer that is free may be filled again although
    the device has not read it yet.

    Args:
        device: where the blocks run.

    Attributes:
        held_bytes: in buffers that hold something now.
        pinned_bytes: in all buffers; they are kept for the next step, while there is room.
    """

    def __init__(self, device: torch.device) -> None:
        self.held_bytes = self.pinned_bytes = 0
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._free: dict[int, list[Tensor]] = {}
        self._last: Callable[[], _Call | None] = lambda: None

    @functools.cached_property
    def limit_bytes(self) -> int:
        """The most that may be pinned: half of what was free when it was first asked for."""
        return round(_SHARE * available_bytes())

    def offloaded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward(module, ...)`, which saves on the host what its backward needs.

        Parameters, buffers, and arguments without gradients stay: others hold them anyway.

        Raises:
            HostMemoryError: when it runs.
        """

        def run(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            others = tree_leaves((arguments, keywords))
            stay = [x for x in others if isinstance(x, Tensor) and not x.requires_grad]
            stay += [*module.parameters(), *module.buffers()]
            with self._call(stay):
                return forward(module, *arguments, **keywords)

        return run

    @contextlib.contextmanager
    def _call(self, stay: list[Tensor]) -> Iterator[None]:
        call = _Call(self, self._last(), {_key(x) for x in stay if x.layout is torch.strided})
        self._last = weakref.ref(call)
        try:
            with torch.autograd.graph.saved_tensors_hooks(call.pack, _unpack):
                yield
        finally:
            call.settle()

    def take(self, size: int) -> Tensor:
        """A pinned buffer of `size` bytes or more.

        Raises:
            HostMemoryError: the host has too little.
        """
        # What torch rounds pinned memory up to; so, buffers fit again where shapes vary.
        size = 1 << (size - 1).bit_length()
        free = self._free.setdefault(size, [])
        if not free:
            if self.pinned_bytes + size > self.limit_bytes:
                self._release()
            if self.pinned_bytes + size > self.limit_bytes:
                raise HostMemoryError(
                    "memory.plan: activations on the host must fit half of its free memory,"
                    f" {self.limit_bytes / 2**30:.2f} GiB; got more; use a plan without offload, or"
                    " lower data.batch_size"
                )
            free.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu))
            self.pinned_bytes += size
        self.held_bytes += size
        return free.pop()

    def _release(self) -> None:
        """Unpins the buffers that hold nothing, of sizes that may not be asked for again."""
        for buffers in self._free.values():
            buffers.clear()
        self.pinned_bytes = self.held_bytes
        if self._on_gpu:
            # torch would keep them pinned, for others of their size.
            torch._C._host_emptyCache()

    def give_back(self, buffer: Tensor) -> None:
        """Ends the use of a buffer, but for copies that are on their way."""
        self.held_bytes -= buffer.nbytes
        self._free[buffer.nbytes].append(buffer)

    def is_here(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device of the blocks."""
        index = self._device.index
        return tensor.device.type == self._device.type and index in (None, tensor.device.index)

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Target <- source of each pair, after all work so far; returns what marks the end."""
        if not self._on_gpu:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        end = torch.cuda.Event()
        end.record(self._stream)
        return end

    def wait(self, end: torch.cuda.Event | None) -> None:
        """Work on the device from now on comes after the copies."""
        if end is not None:
            torch.cuda.current_stream(self._device).wait_event(end)


class _Call:
    """One call of a block, and what it has saved; the autograd graph owns its copies."""

    def __init__(self, host: Host, before: "_Call | None", stay: set[int]) -> None:
        self.host, self._stay = host, stay
        self._before = weakref.ref(before) if before is not None else lambda: None
        self._copies: weakref.WeakSet[_Copy] = weakref.WeakSet()
        # Only while the block runs: copies by storage and version, and what they are copies of.
        self._sent: dict[tuple[int, int], _Copy] = {}
        self._sources: list[tuple[_Saved, Tensor]] = []
        self._end: torch.cuda.Event | None = None
        self._running = True

    def pack(self, tensor: Tensor) -> "_Saved":
        """Sends a tensor to the host, its storage once, or lets it stay."""
        if not self._moves(tensor):
            return _Saved(tensor, None)
        # Changed in place since it was sent, it is another tensor, and sent again.
        key = _key(tensor), tensor._version
        if key not in self._sent:
            storage = _bytes(tensor)
            copy = _Copy(self, storage)
            self._end = self.host.copy([(copy.buffer, storage)])
            self._sent[key] = copy
            self._copies.add(copy)
        saved = _Saved(tensor, self._sent[key])
        self._sources.append((saved, tensor.detach()))
        return saved

    def _moves(self, tensor: Tensor) -> bool:
        # A subclass may hold more than its storage; it has none that counts if it is fake.
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        return (
            plain
            and self.host.is_here(tensor)
            and not (tensor.is_conj() or tensor.is_neg())
            and not (tensor.is_leaf and tensor.requires_grad)
            and tensor.untyped_storage().nbytes() >= _LEAST_BYTES
            and _key(tensor) not in self._stay
        )

    def settle(self) -> None:
        """The block has run: from here on the device may use the memory of what was sent."""
        self.host.wait(self._end)
        for saved, source in self._sources:
            saved.check(source)
        self._running = False
        self._sources.clear()
        self._sent.clear()

    def arrive(self) -> None:
        """Makes the device wait for the tensors, and begins with those of the call before."""
        self._fetch()
        self.host.wait(self._end)
        before = self._before()
        # A backward pass inside of a forward is none of the whole step.
        if before is not None and not self._running:
            before._fetch()

    def _fetch(self) -> None:
        """Begins to copy back what has not been."""
        missing = [copy for copy in self._copies if copy.back is None]
        if not missing:
            return
        # Memory of the main stream, which is done with it when the copies begin.
        pairs = [(torch.empty_like(copy.buffer, device=copy.device), copy) for copy in missing]
        self._end = self.host.copy([(back, copy.buffer) for back, copy in pairs])
        for back, copy in pairs:
            copy.back, copy.end = back, self._end


class _Copy:
    """A storage on the host; and on the device again, from when it is fetched.

    Attributes:
        buffer, back: the bytes there and here.
        end: marks that they are here.
    """

    def __init__(self, call: _Call, storage: Tensor) -> None:
        self.call, self.device = call, storage.device
        self._whole = call.host.take(storage.nbytes)
        self.buffer = self._whole[: storage.nbytes]
        self.back: Tensor | None = None
        self.end: torch.cuda.Event | None = None

    def __del__(self) -> None:
        # A backward pass that was given up may leave copies on their way to memory that is freed.
        if not sys.is_finalizing() and hasattr(self, "_whole"):
            self.call.host.wait(self.end)
            self.call.host.give_back(self._whole)


class _Saved:
    """A saved tensor: one that stayed, or a view of a copy."""

    def __init__(self, tensor: Tensor, copy: _Copy | None) -> None:
        self._copy, self._version, self._changed = copy, tensor._version, False
        if copy is None:
            # Detached, unless a leaf: a graph that holds its own output would never be freed.
            self._here = tensor if tensor.is_leaf else tensor.detach()
        else:
            self._view = (tensor.storage_offset(), tensor.size(), tensor.stride())
            self._dtype = tensor.dtype

    def check(self, tensor: Tensor) -> None:
        """Notes whether it was changed in place since it was saved: its copy may be of both."""
        self._changed |= tensor._version != self._version

    def restore(self) -> Tensor:
        """The tensor, with its strides.

        Raises:
            RuntimeError: it was changed in place after it was saved.
        """
        if self._copy is None:
            self.check(self._here)
        if self._changed:
            # As torch says it where there are no hooks.
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an"
                " inplace operation"
            )
        if self._copy is None:
            return self._here
        self._copy.call.arrive()
        assert self._copy.back is not None
        storage = self._copy.back.untyped_storage()
        empty = torch.empty(0, dtype=self._dtype, device=self._copy.device)
        return empty.set_(storage, *self._view)


def _unpack(saved: _Saved) -> Tensor:
    return saved.restore()


def _key(tensor: Tensor) -> int:
    """The same for all tensors of one storage while it lives."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def available_bytes() -> int:
    """What the host could still give to this process, by Linux and by a container's limit."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    free = 1024 * int(fields["MemAvailable"].split()[0])
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        return min(free, max(0, most - int((group / "memory.current").read_text())))
    except (OSError, ValueError):
        # No such limit, or the word 'max'.
        return free
