"""Adam and AdamW for all tensors and groups at once: two launches, one of them a few microseconds.

Formula, with g = grad / divisor (+ weight_decay * p if not decoupled), t the tensor's step:
m = m + (1 - beta1) * (g - m); v = v + (1 - beta2) * (g^2 - v);
p = p * (1 - lr * weight_decay if decoupled)
    - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps).

Shapes: any number of tensors of any shape, as tables of addresses (`tensor_table`).
Numerics: float32 inside; 1 - beta^t as -expm1(t * log(beta)), as exact at step 1 as at 10^6;
moments in float32, in bf16 with stochastic rounding, or in 8-bit block floating point (`rounding`).
The divisor and the skip flag are read from the device: skip != 0 changes nothing at all.
Memory: p, g, m, v read, p, m, v written, each once: 28, 20 or 16.03 bytes per float32 parameter.
Source: Kingma, Ba 2015 (arXiv 1412.6980); Loshchilov, Hutter 2019 (arXiv 1711.05101).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels.device import RepeatedLaunch, ceil_div
from fastft_kernels.rounding import QUANTUM, decode, encode, random_bits, round_to_bf16
from fastft_kernels.tensor_table import ChunkTable, Kinds

HYPER_COLUMNS = 7
SCALAR_COLUMNS = 8


def hyper_row(
    betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool
) -> list[float]:
    """What the kernels read per group besides the learning rate; logarithms taken in float64."""
    logs = [math.log(b) if b > 0 else -math.inf for b in betas]
    coupled, apart = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    return [1 - betas[0], 1 - betas[1], *logs, eps, coupled, apart]


def reference(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, lr: float, hyper: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, m, v) after one step, in the dtype of p; step is already that of this update."""
    one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, coupled, apart = hyper
    g = g + coupled * p
    m, v = (x * (y < 1) for x, y in ((m, one_minus_beta1), (v, one_minus_beta2)))
    m = m + one_minus_beta1 * (g - m)
    v = v + one_minus_beta2 * (g * g - v)
    correction1, correction2 = (-torch.expm1(step.double() * log) for log in (log_beta1, log_beta2))
    update = (lr / correction1).to(p) * m / (v.sqrt() / correction2.sqrt().to(p) + eps)
    return p * (1 - lr * apart) - update, m, v


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation near 0."""
    series = 1.0
    for i in tl.static_range(8):  # pyright: ignore
        series = 1.0 + x / (9 - i) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize_on_alignment=["SKIP"])
def _prepare_kernel(
    STEP,
    GRAD,
    GROUP,
    LR,
    HYPER,
    SKIP,
    SCALARS,
    tensors,
    HYPER_COLUMNS: tl.constexpr,
    SCALAR_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts each tensor's step and works out the scalars that all its elements share."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < tensors
    present = tl.load(GRAD + tensor, mask=inside, other=0) != 0
    one = tl.where(tl.load(SKIP) == 0.0, 1.0, 0.0)
    step = tl.load(STEP + tensor, mask=inside, other=0.0) + tl.where(present, one, 0.0)
    tl.store(STEP + tensor, step, mask=inside)
    group = tl.load(GROUP + tensor, mask=inside, other=0)
    lr = tl.load(LR + group, mask=inside, other=0.0)
    hyper = HYPER + group * HYPER_COLUMNS
    log_beta1 = tl.load(hyper + 2, mask=inside, other=-1.0)
    log_beta2 = tl.load(hyper + 3, mask=inside, other=-1.0)
    apart = tl.load(hyper + 6, mask=inside, other=0.0)
    # A tensor that never had a gradient is at step 0, where the corrections are 0.
    step = tl.maximum(step, 1.0)
    scalars = SCALARS + tensor * SCALAR_COLUMNS
    tl.store(scalars + 0, tl.load(hyper + 0, mask=inside, other=0.0), mask=inside)
    tl.store(scalars + 1, tl.load(hyper + 1, mask=inside, other=0.0), mask=inside)
    tl.store(scalars + 2, lr / _one_minus_exp(step * log_beta1), mask=inside)
    tl.store(scalars + 3, 1.0 / tl.sqrt(_one_minus_exp(step * log_beta2)), mask=inside)
    tl.store(scalars + 4, tl.load(hyper + 4, mask=inside, other=0.0), mask=inside)
    tl.store(scalars + 5, tl.load(hyper + 5, mask=inside, other=0.0), mask=inside)
    tl.store(scalars + 6, 1.0 - lr * apart, mask=inside)
    tl.store(scalars + 7, step, mask=inside)


@triton.jit
def _load(pointer, inside, MASKED: tl.constexpr):
    return tl.load(pointer, mask=inside, other=0) if MASKED else tl.load(pointer)


@triton.jit
def _store(pointer, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer, value, mask=inside)
    else:
        tl.store(pointer, value)


@triton.jit
def _pointer(address, dtype, ALIGNED: tl.constexpr):
    """An address out of a table, known to be aligned or not.

    Four elements, whatever the dtype: then every stream has the same four per thread, and none
    is exchanged through shared memory to meet another.
    """
    pointer = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 4 * dtype.primitive_bitwidth // 8) if ALIGNED else pointer


@triton.jit
def _pointers(
    addresses, tensor, tensors, param_dtype, grad_dtype, ALIGNED: tl.constexpr, LAYOUT: tl.constexpr
):
    """p, g, m, v and (8-bit) the exponents of m and v."""
    narrow = tl.bfloat16 if LAYOUT == "bf16" else tl.uint8
    stored = tl.float32 if LAYOUT == "fp32" else narrow
    param, gradient, MOMENTS = addresses
    moments = MOMENTS + tensor
    p = _pointer(param, param_dtype, ALIGNED)
    g = _pointer(gradient, grad_dtype, ALIGNED)
    m = _pointer(tl.load(moments), stored, ALIGNED)
    v = _pointer(tl.load(moments + tensors), stored, ALIGNED)
    m_exponent = _pointer(tl.load(moments + 2 * tensors), tl.uint8, False)
    v_exponent = _pointer(tl.load(moments + 3 * tensors), tl.uint8, False)
    return p, g, m, v, m_exponent, v_exponent


@triton.jit
def _update_chunk(
    pointers,
    scalars,
    place,
    LAYOUT: tl.constexpr,
    MASKED: tl.constexpr,
    STATISTICS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    p_pointer, g_pointer, m_pointer, v_pointer, m_exponent, v_exponent = pointers
    one_minus_beta1, one_minus_beta2, step_size, correction, eps, coupled, kept = scalars
    start, numel, inverse_divisor, seed = place
    # Without a beta nothing of a moment is left, not even the rounding of what it was.
    keeps_m = tl.where(one_minus_beta1 < 1.0, 1.0, 0.0)
    keeps_v = tl.where(one_minus_beta2 < 1.0, 1.0, 0.0)
    block: tl.constexpr = BLOCK // QUANTUM
    g_square = tl.zeros([block], tl.float32)
    u_square = tl.zeros([block], tl.float32)
    p_square = tl.zeros([block], tl.float32)
    for first in tl.range(0, tl.minimum(CHUNK, numel - start), BLOCK, num_stages=STAGES):
        quantum = start // QUANTUM + first // QUANTUM + tl.arange(0, block)
        at = quantum[:, None] * QUANTUM + tl.arange(0, QUANTUM)[None, :]
        inside = at < numel
        g = _load(g_pointer + at, inside, MASKED).to(tl.float32) * inverse_divisor
        p = _load(p_pointer + at, inside, MASKED)
        m = _load(m_pointer + at, inside, MASKED)
        v = _load(v_pointer + at, inside, MASKED)
        old = p.to(tl.float32)
        if LAYOUT == "8bit":
            has_quantum = quantum * QUANTUM < numel
            m = decode(m, _load(m_exponent + quantum, has_quantum, MASKED), True)
            v = decode(v, _load(v_exponent + quantum, has_quantum, MASKED), False)
        m = m.to(tl.float32) * keeps_m
        v = v.to(tl.float32) * keeps_v
        grad = g + coupled * old
        m += one_minus_beta1 * (grad - m)
        v += one_minus_beta2 * (grad * grad - v)
        new = old * kept - step_size * m / (tl.sqrt(v) * correction + eps)
        _store(p_pointer + at, new.to(p.dtype), inside, MASKED)
        if LAYOUT == "fp32":
            _store(m_pointer + at, m, inside, MASKED)
            _store(v_pointer + at, v, inside, MASKED)
        else:
            bits = random_bits(at.to(tl.uint32), seed)
            if LAYOUT == "bf16":
                _store(m_pointer + at, round_to_bf16(m, bits & 0xFFFF), inside, MASKED)
                _store(v_pointer + at, round_to_bf16(v, bits >> 16), inside, MASKED)
            else:
                m_code, m_top = encode(m, bits & 0xFFFF, True)
                v_code, v_top = encode(v, bits >> 16, False)
                _store(m_pointer + at, m_code, inside, MASKED)
                _store(v_pointer + at, v_code, inside, MASKED)
                _store(m_exponent + quantum, m_top, has_quantum, MASKED)
                _store(v_exponent + quantum, v_top, has_quantum, MASKED)
        if STATISTICS:
            g_square += tl.sum(g * g, axis=1)
            u_square += tl.sum((new - old) * (new - old), axis=1)
            p_square += tl.sum(new * new, axis=1)
    return tl.sum(g_square), tl.sum(u_square), tl.sum(p_square)


@triton.jit(do_not_specialize_on_alignment=["DIVISOR", "SKIP"])
def _adam_kernel(
    PARAM,
    GRAD,
    MOMENTS,
    SCALARS,
    NUMEL,
    KIND,
    CHUNK_TENSOR,
    CHUNK_INDEX,
    DIVISOR,
    SKIP,
    STATISTIC,
    tensors,
    seed,
    KINDS: tl.constexpr,
    LAYOUT: tl.constexpr,
    STATISTICS: tl.constexpr,
    SCALAR_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Masked accesses go one by one and need registers for every address: keep their tile small.
    TAIL: tl.constexpr = BLOCK // 4
    chunk = tl.program_id(0)
    tensor = tl.load(CHUNK_TENSOR + chunk)
    gradient = tl.load(GRAD + tensor)
    if gradient != 0 and tl.load(SKIP) == 0.0:
        start = tl.load(CHUNK_INDEX + chunk).to(tl.int64) * CHUNK
        numel = tl.load(NUMEL + tensor)
        kind = tl.load(KIND + tensor)
        shared = SCALARS + tensor * SCALAR_COLUMNS
        scalars = (
            tl.load(shared + 0),
            tl.load(shared + 1),
            tl.load(shared + 2),
            tl.load(shared + 3),
            tl.load(shared + 4),
            tl.load(shared + 5),
            tl.load(shared + 6),
        )
        step = tl.load(shared + 7).to(tl.uint32)
        mixed = random_bits(tensor.to(tl.uint32), random_bits(step, seed.to(tl.uint32)))
        addresses = (tl.load(PARAM + tensor), gradient, MOMENTS)
        place = (start, numel, 1.0 / tl.load(DIVISOR), mixed)
        for k in tl.static_range(len(KINDS)):
            if kind == k:
                at = _pointers(
                    addresses, tensor, tensors, KINDS[k][0], KINDS[k][1], KINDS[k][2], LAYOUT
                )
                sums = (0.0, 0.0, 0.0)
                if start + CHUNK <= numel:
                    sums = _update_chunk(
                        at, scalars, place, LAYOUT, False, STATISTICS, CHUNK, BLOCK, STAGES
                    )
                else:
                    sums = _update_chunk(
                        at, scalars, place, LAYOUT, True, STATISTICS, CHUNK, TAIL, STAGES
                    )
                if STATISTICS:
                    tl.store(STATISTIC + chunk * 3 + 0, sums[0])
                    tl.store(STATISTIC + chunk * 3 + 1, sums[1])
                    tl.store(STATISTIC + chunk * 3 + 2, sums[2])


@dataclass(frozen=True)
class AdamSchedule:
    """Elements per program and per iteration of its loop, warps, and stages of prefetch."""

    chunk: int
    block: int
    warps: int
    stages: int = 1


SCHEDULES = {
    "fp32": AdamSchedule(chunk=4096, block=4096, warps=8),
    "bf16": AdamSchedule(chunk=2048, block=2048, warps=4),
    "8bit": AdamSchedule(chunk=4096, block=1024, warps=4),
}


def launch_adam(
    tables: "AdamTables", divisor: Tensor, skip: Tensor, layout: str, seed: int
) -> None:
    """One step of every tensor in the tables; see the module's docstring for the formula."""
    # The launches are compiled for float32.
    divisor, skip = divisor.float(), skip.float()
    tables.launches = tables.launches or _launches(tables, layout)
    prepare, update = tables.launches
    tensors = len(tables.step)
    prepare(
        *(tables.step, tables.grads, tables.group, tables.lr, tables.hyper),
        *(skip, tables.scalars, tensors),
    )
    if tables.chunks.chunks:
        update(
            *(tables.params, tables.grads, tables.moments, tables.scalars),
            *(tables.chunks.numel, tables.kinds.index, tables.chunks.tensor, tables.chunks.index),
            *(divisor, skip, tables.statistic, tensors, seed),
        )


def _launches(tables: "AdamTables", layout: str) -> tuple[RepeatedLaunch, RepeatedLaunch]:
    device, schedule, block = tables.step.device, tables.schedule, 256
    prepare = RepeatedLaunch(
        _prepare_kernel,
        ceil_div(len(tables.step), block),
        device,
        HYPER_COLUMNS=HYPER_COLUMNS,
        SCALAR_COLUMNS=SCALAR_COLUMNS,
        BLOCK=block,
    )
    update = RepeatedLaunch(
        _adam_kernel,
        tables.chunks.chunks,
        device,
        num_warps=schedule.warps,
        moved_bytes=tables.moved_bytes,
        KINDS=tables.kinds.names,
        LAYOUT=layout,
        STATISTICS=tables.statistic is not None,
        SCALAR_COLUMNS=SCALAR_COLUMNS,
        CHUNK=schedule.chunk,
        BLOCK=schedule.block,
        STAGES=schedule.stages,
    )
    return prepare, update


@dataclass
class AdamTables:
    """What the two kernels read, on the device; `fused_adam` fills it.

    Attributes:
        step, group, lr, hyper: per tensor the step count (float32) and group number, per group
            the learning rate, on the host (`HostNumbers`), and `hyper_row`.
        params, grads: addresses, int64 `[tensors]`; grads holds 0 where there is no gradient.
        moments: addresses of m, v and (8-bit) their exponents, int64 `[4, tensors]`.
        statistic: float32 `[chunks, 3]` or None.
        moved_bytes: by one step.
        launches: of both kernels; None: to be made for the kinds.
    """

    schedule: AdamSchedule
    chunks: ChunkTable
    kinds: Kinds
    step: Tensor
    group: Tensor
    lr: Tensor
    hyper: Tensor
    params: Tensor
    grads: Tensor
    moments: Tensor
    scalars: Tensor
    statistic: Tensor | None
    moved_bytes: int = 0
    launches: tuple[RepeatedLaunch, RepeatedLaunch] | None = None
