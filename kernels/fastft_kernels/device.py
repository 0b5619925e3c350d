"""Where a kernel runs, and the shape questions every row-wise op asks."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import forward_ad, profiler
from triton import knobs

MAX_COLUMNS = 16384
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of an attention's head.
HEAD_COLUMNS = (16, 32, 64, 128)

# As it was when the kernels were decorated; setting the variable later changes nothing.
_INTERPRETED = bool(knobs.runtime.interpret)
_NOTHING = contextlib.nullcontext()
_interpreting = False
_pretending = False


def interpret_on_cpu(enabled: bool) -> None:
    """Sends CPU tensors through the Triton kernels; needs TRITON_INTERPRET=1 set before import.

    Off by default: a CPU tensor then takes the op's plain-torch reference, which is far faster
    than the interpreter.
    """
    global _interpreting
    if enabled and not _INTERPRETED:
        raise RuntimeError(
            "interpret_on_cpu: TRITON_INTERPRET must be 1 before fastft_kernels is imported; "
            "got it unset; set it in the environment or at the top of conftest.py"
        )
    _interpreting = enabled


def runs_triton(tensor: torch.Tensor) -> bool:
    """True on a GPU, and on the CPU while the interpreter is switched on."""
    return tensor.is_cuda or _interpreting


def by_default(device: torch.device) -> bool:
    """Whether models on the device use the kernels unless told not to."""
    return device.type == "cuda" or _pretending


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """In this context models on a CPU use the ops too, as they would on a GPU."""
    global _pretending
    before, _pretending = _pretending, True
    try:
        yield
    finally:
        _pretending = before


@functools.cache
def _properties(index: int) -> tuple[int, int, float]:
    found = torch.cuda.get_device_properties(index)
    # kHz, twice a clock; bits.
    bandwidth = 2e3 * found.memory_clock_rate * found.memory_bus_width / 8
    return found.multi_processor_count, found.shared_memory_per_block_optin, bandwidth


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once; 3 under the interpreter, so that tiny tests still share."""
    return 3 if device.type != "cuda" else _properties(device.index)[0]


def shared_memory_bytes(device: torch.device) -> int:
    """What one program may use; that of an H200 where there is no GPU."""
    return 232448 if device.type != "cuda" else _properties(device.index)[1]


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second by its clock, an H100 3.4e12; that of an H200, 4.9e12, without a GPU."""
    return 4.9e12 if device.type != "cuda" else _properties(device.index)[2]


def transformed() -> bool:
    """Whether forward-mode derivatives or a torch.func transform are being taken."""
    if torch.compiler.is_compiling():
        return False
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *arguments: Any,
    moved_bytes: int | None = None,
    flops: int | None = None,
    **options: Any,
) -> None:
    """Runs a Triton kernel on the tensors' device, which need not be the current one.

    Args:
        moved_bytes: what profiles show of a kernel that goes by tables of addresses; of others they
            show the arguments.
        flops: what profiles show of a kernel that computes matrix products.
    """
    with _current(device), _seen_by_profiler(kernel, arguments, moved_bytes, flops):
        kernel[grid](*arguments, **options)


def _seen_by_profiler(
    kernel: Any, arguments: Sequence[Any], moved_bytes: int | None, flops: int | None = None
) -> contextlib.AbstractContextManager:
    """While torch's profiler runs, an operator of the kernel's name, as Inductor's launches are.

    It holds each tensor among the arguments once, or `moved_bytes`, and `flops`. A tensor of int64
    is a table of addresses, and says nothing of what lies there: without `moved_bytes` there is no
    operator.
    """
    if not profiler._is_profiler_enabled:
        return _NOTHING
    told = {"bytes": moved_bytes, "flops": flops}
    told = {name: value for name, value in told.items() if value is not None}
    if moved_bytes is not None:
        return _RecordFunctionFast(kernel.__name__, (), told)
    tensors = {id(t): t for t in arguments if isinstance(t, torch.Tensor)}.values()
    if any(tensor.dtype is torch.int64 for tensor in tensors):
        return _NOTHING
    return _RecordFunctionFast(kernel.__name__, tuple(tensors), told)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _NOTHING


class RepeatedLaunch:
    """A launch made at every step, with arguments of the same dtypes and alignment each time.

    Triton finds the compiled kernel by all arguments of each call, which takes a host longer than
    to launch it; here that is done once.

    Args:
        moved_bytes: what profiles show of a kernel that goes by tables of addresses; of others they
            show the arguments.
        options: the kernel's constants, which follow its other arguments, and `num_warps`.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        device: torch.device,
        num_warps: int = 4,
        moved_bytes: int | None = None,
        **options: Any,
    ) -> None:
        self._kernel, self._grid, self._device = kernel, (programs, 1, 1), device
        self._warps, self._moved_bytes, self._constants = num_warps, moved_bytes, options
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> None:
        """Everything but the constants, in the kernel's order."""
        seen = _seen_by_profiler(self._kernel, arguments, self._moved_bytes)
        with _current(self._device), seen:
            if self._compiled is not None:
                self._compiled[self._grid](*arguments, *self._constants.values())
                return
            # None under the interpreter.
            self._compiled = self._kernel[self._grid](
                *arguments, **self._constants, num_warps=self._warps
            )


def as_rows(x: torch.Tensor, columns: int) -> torch.Tensor:
    """`[..., N]` as `[rows, N]` with unit column stride; copies only where no view exists."""
    rows = x.reshape(-1, columns)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_columns(op: str, x: torch.Tensor, *weights: torch.Tensor | None) -> None:
    """Raises ValueError for a dtype or row length that the row kernels do not cover.

    Args:
        weights: what must have one value per column, or None.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: x must be float32, bfloat16 or float16; got {x.dtype}; cast it")
    if not x.dim() or not 1 <= x.shape[-1] <= MAX_COLUMNS:
        found = x.shape[-1] if x.dim() else "none"
        raise ValueError(
            f"{op}: the last dimension must be 1 to {MAX_COLUMNS}; got {found}; "
            "use torch.nn.functional.layer_norm there"
        )
    for weight in weights:
        if weight is not None and weight.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: weight and bias must have the shape of x's last dimension, "
                f"{tuple(x.shape[-1:])}; got {tuple(weight.shape)}; make them one value per column"
            )


def output_dtype(x: torch.Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on: of products with x, and of norms, which must not
    widen what they return."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
