"""A step's memory and time without a GPU: fake tensors, counted and timed by a model.

Fake tensors have shapes and no values. They are CPU ones, because torch cannot run a backward pass
over fake CUDA tensors where there is no driver; `as_on_gpu` makes up for the differences.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fastft.blocks import RECOMPUTE, BlockForwards
from fastft.config import RunConfig
from fastft.memory.fake_mode import FakeMode, NothingCompiled
from fastft.memory.measure import (
    assemble_costs,
    capture_calls,
    measure_rest,
)
from fastft.memory.menu import Menu
from fastft.memory.solve import StepCosts
from fastft.optim import state_bytes
from fastft.step import TrainingStep
from fastft.task import Batch

# The CUDA caching allocator rounds every size up to this.
_ROUND = 512
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Speed:
    """What a GPU reaches; `matmul`: FLOP/s by dtype, `bytes_per_second`: copies."""

    name: str
    bytes_per_second: float
    matmul: dict[torch.dtype, float]


def a100(*, tf32: bool = False) -> Speed:
    """Peaks of NVIDIA's A100 data sheet (2021), and the bandwidth that copies reach."""
    fast = dict.fromkeys(_NARROW, 312e12)
    return Speed("A100", 1.6e12, {**fast, torch.float32: 156e12 if tf32 else 19.5e12})


class FakeMeter(NothingCompiled, TorchDispatchMode):
    """Counts the storages that operators make while it is entered; works for real tensors too.

    A storage counts from the operator that made it until it is freed. An operator takes the longer
    of its arithmetic at peak rate and its bytes at full bandwidth: a roofline (Williams et al.
    2009), so times are lower bounds. Views and `empty` are free.
    """

    steady = True

    def __init__(self, speed: Speed | None = None) -> None:
        super().__init__()
        self._speed = speed or a100()
        self._live: dict[int, weakref.ref[Any]] = {}
        self._allocated = self._peak = 0
        self._seconds = 0.0

    def allocated(self) -> int:
        """Bytes in storages now, each rounded up to 512."""
        return self._allocated

    def peak(self) -> int:
        """The most since `reset_peak`."""
        return self._peak

    def reset_peak(self) -> None:
        """Begins a new peak, from what is allocated now."""
        self._peak = self._allocated

    def seconds(
        self, call: Callable[[], object], repeats: int, *, host_ahead: bool = False
    ) -> float:
        """What the roofline gives for one call; all are alike."""
        before, self._seconds = self._seconds, 0.0
        call()
        # Not a difference, whose rounding would tell equal calls apart.
        spent = self._seconds
        self._seconds += before
        return spent

    def hold(self, values: Any) -> None:
        """Counts tensors that were made outside of the mode."""
        self._hold(x for x in tree_leaves(values) if isinstance(x, Tensor))

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.layout == torch.strided:
                self._count(tensor.untyped_storage())

    def pass_time(self, moved_bytes: float) -> None:
        """Adds the time of moving bytes that no operator moves."""
        self._seconds += moved_bytes / self._speed.bytes_per_second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operator, then counts what it made and the time it would take."""
        if func is torch.ops.prim.device.default:
            # Asked several times per operator.
            return args[0].device
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace == "prim":
            # A question about a tensor.
            return output
        self._hold(_tensors((output,)))
        if not (_is_view(func) or "empty" in func.__name__):
            self._seconds += self._time(func, args, kwargs, output)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND

        def freed(_: object) -> None:
            del self._live[key]
            self._allocated -= size

        self._live[key] = weakref.ref(storage, freed)
        self._allocated += size
        self._peak = max(self._peak, self._allocated)

    def _time(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> float:
        tensors = list(_tensors((*args, *kwargs.values(), output)))
        moved = sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
        seconds = moved / self._speed.bytes_per_second
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None and tensors:
            rate = self._speed.matmul.get(tensors[0].dtype, self._speed.matmul[torch.float32])
            seconds = max(seconds, formula(*args, **kwargs, out_val=output) / rate)
        return seconds


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operator's arguments or results, which may be lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


_ATEN = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch has no formula for its CPU attention.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def _is_view(func: Any) -> bool:
    return func.is_view or func._overloadpacket in (_ATEN._unsafe_view, _ATEN.lift_fresh)


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """CPU tensors take the operators and the autocast dtypes that CUDA tensors take.

    Autocast on a GPU computes more in fp32 than on a CPU; fused attention takes dropout there, and
    dropout keeps a mask of one byte per value.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in _WIDENED.split():
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(_ATEN, packet), overload or "default")
            library.impl(name, _widened(operator), "AutocastCPU")
        with _GpuFunctions():
            yield
    finally:
        library._destroy()


# What CUDA's autocast computes in fp32 and the CPU's does not (torch 2.11, autocast_mode.h).
_WIDENED = """
    cosine_similarity cumprod cumsum exp expm1 group_norm layer_norm linalg_vector_norm log log10
    log1p log2 log_softmax.int logsumexp native_layer_norm norm.Scalar norm.ScalarOpt_dim
    pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal rsqrt softmax.int softplus sum
    sum.dim_IntList"""


def _widened(operator: Any) -> Callable[..., Any]:
    """The operator in fp32; it converts on its own where it takes a `dtype`."""
    names = [argument.name for argument in operator._schema.arguments]
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            narrow = any(isinstance(x, Tensor) and x.dtype in _NARROW for x in tree_leaves(args))
            if narrow and "dtype" in names:
                named = {**dict(zip(names, args, strict=False)), **kwargs}
                named["dtype"] = named.get("dtype") or torch.float32
                return operator(**named)
            return operator(*tree_map_only(Tensor, _wide, args), **kwargs)

    return run


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _NARROW else x


class _GpuFunctions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = _AS_ON_GPU.get(func) or func
        return call(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, p: float = 0.0, *rest: Any, **keywords: Any
) -> Tensor:
    # Without dropout the same kernel runs, and keeps the same.
    mask, _ = keywords.pop("attn_mask", mask), keywords.pop("dropout_p", p)
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, *rest, **keywords)


_AS_ON_GPU: dict[Any, Callable[..., Tensor]] = {
    nn.functional.dropout: _dropout,
    nn.functional.scaled_dot_product_attention: _attention,
}


class Unfilled(TorchFunctionMode):
    """Fills leave memory untouched: fast, for a model that is built and never run.

    Those with random numbers, and with zeros where they are parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unfilled: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skips the fills, and what makes a fill another one right behind it."""
        first = args[0] if args else (kwargs or {}).get("tensor")
        fills = func in _FILLS or (func is Tensor.zero_ and isinstance(first, nn.Parameter))
        if fills or (func in _RESCALES and first is self._unfilled):
            self._unfilled = first
            return first
        self._unfilled = None
        return func(*args, **(kwargs or {}))


_FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_)
_FILLS += (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
_RESCALES = (Tensor.mul_, Tensor.add_, Tensor.clamp_)


@contextlib.contextmanager
def on_fake_tensors(meter: FakeMeter) -> Iterator[FakeTensorMode]:
    """In this context tensors are fake, behave as on a GPU, and are counted."""
    with as_on_gpu(), FakeMode() as mode, meter:
        yield mode


def make_fake(model: nn.Module, mode: FakeTensorMode, meter: FakeMeter) -> None:
    """Swaps parameters and buffers for counted fake ones; what nobody else holds is freed."""
    for module in model.modules():
        tables = cast(list[dict[str, Any]], [module._parameters, module._buffers])
        for table, (name, tensor) in ((t, item) for t in tables for item in t.items()):
            if tensor is not None:
                # Tied weights stay tied: the mode knows what it has seen.
                table[name] = mode.from_tensor(tensor)
                meter.hold(table[name])


def fake_batch(batch: Batch, mode: FakeTensorMode, meter: FakeMeter) -> Batch:
    """The same batch of counted fake tensors."""
    data = tree_map_only(Tensor, mode.from_tensor, dict(batch.data))
    meter.hold(data)
    return replace(batch, data=data)


def estimate_costs(
    config: RunConfig,
    step: TrainingStep,
    forwards: BlockForwards,
    batches: Sequence[Batch],
    meter: FakeMeter,
) -> StepCosts:
    """The whole menu, inside of `on_fake_tensors`; leaves every block recomputing all.

    No optimizer step is run: its state is taken from the settings, its time from the bytes that it
    moves. Ways that offload are left out: what they cost is up to the link and the memory of the
    machine that the run is for.
    """
    parameters = step.optimizer.parameters.values()
    weights = sum(p.nbytes for p in parameters)
    state = round(state_bytes(config.optim) * sum(p.numel() for p in parameters))
    held = [torch.empty(state, dtype=torch.uint8)]

    def update(*_: Any, **__: Any) -> None:
        # Reads gradients; reads and writes weights and state.
        meter.pass_time(3 * weights + 2 * state)

    step.optimizer.update = update
    calls = capture_calls(step, batches[0])
    forwards.use_everywhere(RECOMPUTE)
    names = [name for name, way in forwards.ways.items() if not way.offload]
    measured = Menu(step.task, forwards, calls, names, meter).measure()
    del calls
    rest = measure_rest(step, batches, meter)
    costs = assemble_costs(step, rest, measured, len(batches))
    held.clear()
    return replace(costs, update_seconds=meter.seconds(update, repeats=1))
