"""Floating-point operations, from the shapes of torch's operators in a trace, and GPU peaks.

A multiplication and an addition count as two. Only matrix products, convolutions and attention are
counted: of everything else a GPU does thousands per byte it could move. Recomputed work counts
again, and causal attention counts in full; torch.utils.flop_counter does the same. fastft's own
attention kernels say in the trace what they compute, which their tensors do not tell: not the
operators are counted that launch them, but the launches.
"""

import math
import re
from collections.abc import Sequence

from fastft.profiling.trace import Operator

# Dense FLOP/s by data sheet, for (bf16 and fp16, tf32, fp32). The first pattern found in the name
# that the driver gives the device counts. Sources: NVIDIA A100 Tensor Core GPU data sheet (2021);
# NVIDIA H100 Tensor Core GPU data sheet (2023), which prints rates with sparsity, twice the dense
# ones; NVIDIA H200 Tensor Core GPU data sheet (2024), whose chip is the H100's.
_PEAKS = (
    (r"\bA100\b", (312e12, 156e12, 19.5e12)),
    (r"\bH100 PCIe\b", (756e12, 378e12, 51e12)),
    (r"\bH100 NVL\b|\bH200 NVL\b", (835e12, 417.5e12, 60e12)),
    (r"\bH100\b|\bH200\b|\bGH200\b", (989e12, 494.5e12, 67e12)),
)
_COLUMN = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}

_ATTENTION = re.compile(r"^aten::_scaled_dot_product_(\w+_)?attention(_for_cpu)?(_backward)?$")
_LINEAR = ("mkldnn::_linear_pointwise", "mkl::_mkl_linear")


def peak_flops(device: str, precision: str) -> float | None:
    """Dense FLOP/s of a device, by its name and `step.precision`; None: not in the table."""
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device):
            return peaks[_COLUMN[precision]]
    return None


def operator_flops(operator: Operator) -> int:
    """What one call computes, without what it calls; 0 for operators that are not counted."""
    if operator.flops is not None:
        return operator.flops
    name, shapes = operator.name, operator.dims
    match name:
        case "aten::mm" | "aten::_scaled_mm" | "aten::bmm":
            return _product(shapes[:2])
        case "aten::addmm" | "aten::_addmm_activation" | "aten::baddbmm":
            return _product(shapes[1:3])
        case "aten::convolution":
            return _convolution(operator)
        case "aten::convolution_backward":
            return _convolution_backward(operator)
    if name in _LINEAR:
        return 2 * math.prod(shapes[0]) * shapes[1][0] if len(shapes) > 1 and shapes[1] else 0
    if (found := _ATTENTION.match(name)) and found[1] != "math_":
        return _attention(shapes, backward=found[3] is not None)
    return 0


def owners(operators: Sequence[Operator]) -> list[int]:
    """For each operator, the outermost of itself and its callers that is counted, -1: none.

    A counted operator may be computed by others: a convolution by matrix products.
    """
    result: list[int] = []
    for index, operator in enumerate(operators):
        # A caller comes before what it calls.
        owner = result[operator.parent] if operator.parent >= 0 else -1
        result.append(index if owner < 0 and operator_flops(operator) else owner)
    return result


def _product(shapes: Sequence[tuple[int, ...]]) -> int:
    """[..., m, k] times [..., k, n]."""
    if len(shapes) < 2 or len(shapes[0]) < 2 or len(shapes[1]) < 2:
        return 0
    return 2 * math.prod(shapes[0]) * shapes[1][-1]


def _attention(shapes: Sequence[tuple[int, ...]], *, backward: bool) -> int:
    """Queries [B, H, L, D] on keys [B, H, S, D] and values [B, H, S, V].

    Forward: scores and their product with the values. Backward: scores again, and the gradients of
    values, probabilities, queries and keys.
    """
    operands = shapes[1:4] if backward else shapes[:3]
    if [len(shape) for shape in operands] != [4, 4, 4]:
        return 0
    query, key, value = operands
    pairs = 2 * math.prod(query[:3]) * key[2]
    return pairs * (3 * query[3] + 2 * value[3] if backward else query[3] + value[3])


def _convolution(operator: Operator) -> int:
    """Input [B, C, ...], weight [K, C / groups, ...]."""
    shapes, values = operator.dims, operator.values
    if len(shapes) < 2 or len(values) < 7 or len(shapes[1]) < 3:
        return 0
    inputs, weight = shapes[0], shapes[1]
    # The transposed one takes one product per input point, the usual one per output point.
    spatial = inputs[2:]
    if values[6] != "True":
        stride, padding, dilation = (_per_axis(value, len(spatial)) for value in values[3:6])
        spatial = tuple(
            (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
            for size, kernel, step, pad, dil in zip(
                spatial, weight[2:], stride, padding, dilation, strict=True
            )
        )
    return 2 * inputs[0] * math.prod(spatial) * math.prod(weight)


def _convolution_backward(operator: Operator) -> int:
    """Gradients of input and weight, as far as asked for; each takes as much as the forward."""
    shapes, values = operator.dims, operator.values
    if len(shapes) < 3 or len(values) < 11 or len(shapes[2]) < 3:
        return 0
    gradient, inputs, weight = shapes[:3]
    spatial = inputs[2:] if values[7] == "True" else gradient[2:]
    wanted = re.findall("True|False", values[10])[:2].count("True")
    return wanted * 2 * inputs[0] * math.prod(spatial) * math.prod(weight)


def _per_axis(value: str, axes: int) -> list[int]:
    """'[1, 2]' as numbers; one number counts for every axis."""
    numbers = [int(number) for number in re.findall(r"\d+", value)]
    return numbers * axes if len(numbers) == 1 else numbers
