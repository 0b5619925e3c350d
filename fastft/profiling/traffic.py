"""Bytes that kernels move, estimated from the tensors that a trace names, and GPUs' bandwidth.

Inductor and fastft's own launches appear in a trace as operators that are named like the kernel and
hold its tensors. Each tensor counts once, as long as it is stored: what is read and written in
place, or read twice, moves more, and what is read in part, less. Of torch's eager kernels only
those of some operators are counted, whose result follows from their arguments.
"""

import math
import re

from fastft.profiling.trace import Operator

# Bytes/s of the GPU's memory by data sheet; sources as in `flops`. The first pattern found in the
# name that the driver gives the device counts.
_BANDWIDTHS = (
    (r"\bA100.*40GB", 1555e9),
    (r"\bA100 80GB PCIe\b", 1935e9),
    (r"\bA100\b", 2039e9),
    (r"\bH100 PCIe\b", 2000e9),
    (r"\bH100 NVL\b", 3900e9),
    (r"\bH100\b", 3350e9),
    (r"\bH200\b", 4800e9),
)

# As torch's profiler names element types.
_ITEM_BYTES = {
    **{"bool": 1, "unsigned char": 1, "signed char": 1, "short int": 2, "int": 4, "long int": 8},
    **{"c10::Half": 2, "c10::BFloat16": 2, "float": 4, "double": 8},
    **{"c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1},
    **{"c10::complex<float>": 8, "c10::complex<double>": 16},
}

# Eager operators that launch one kernel, and how often they write what is as large as their largest
# argument, beside reading each argument; operators that only write have it among those.
_WRITES = {
    **dict.fromkeys(("aten::copy_", "aten::fill_", "aten::sum"), 0),
    **dict.fromkeys(("aten::add", "aten::sub", "aten::mul", "aten::div"), 1),
    **dict.fromkeys(("aten::add_", "aten::sub_", "aten::mul_", "aten::div_"), 1),
    **dict.fromkeys(("aten::gelu", "aten::silu", "aten::relu", "aten::tanh", "aten::sigmoid"), 1),
    **dict.fromkeys(("aten::gelu_backward", "aten::silu_backward", "aten::threshold_backward"), 1),
    **dict.fromkeys(("aten::_softmax", "aten::_softmax_backward_data"), 1),
    "aten::native_layer_norm": 1,
}


def peak_bandwidth(device: str) -> float | None:
    """Bytes/s of a device's memory, by its name; None: not in the table."""
    return next((rate for name, rate in _BANDWIDTHS if re.search(name, device)), None)


def kernel_bytes(kernel: str, operator: Operator) -> int | None:
    """What the only kernel of an operator moves, without what the operator calls; None: unknown."""
    if operator.bytes is not None:
        return operator.bytes
    sizes = _argument_bytes(operator)
    if operator.name == kernel:
        return sum(sizes) or None
    if operator.name not in _WRITES or not sizes:
        return None
    return sum(sizes) + _WRITES[operator.name] * max(sizes)


def _argument_bytes(operator: Operator) -> list[int]:
    """Of each tensor."""
    known = zip(operator.dims, operator.strides, operator.types, strict=False)
    return [
        _stored(dims, strides) * _ITEM_BYTES[kind]
        for dims, strides, kind in known
        if kind in _ITEM_BYTES
    ]


def _stored(dims: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements without those that an expanded tensor repeats."""
    count = math.prod(dims)
    if not count or len(strides) != len(dims):
        return count
    return min(count, 1 + sum((size - 1) * step for size, step in zip(dims, strides, strict=True)))
