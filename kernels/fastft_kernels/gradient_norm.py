"""Gradient norms of many tensors in two launches, with the clip decision left on the device.

Formula: L2 norm and largest magnitude per tensor, per group and over all, over the loss scale; clip
coefficient min(1, threshold / (norm + 1e-6)), threshold = max_norm. With ZClip, z = (norm - mean) /
std of past norms, and where z > z_limit the threshold is at most mean + z_limit^2 / z * std.

Shapes: any number of tensors of any shape and float dtype, as tables of addresses.
Numerics: float32 sums within a chunk, float64 over chunks, both in a fixed order. The largest
magnitude counts a NaN as inf. With any NaN or inf, skip is 1 and the coefficient 1; so it is where
squares overflow float32, from magnitudes of 1.8e19 on.
Memory: every gradient is read once; 12 bytes per chunk besides.
Source: Pascanu et al. 2013 (arXiv 1211.5063); ZClip: Kumar et al. 2025 (arXiv 2504.02507).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels.device import launch
from fastft_kernels.tensor_table import ChunkTable, Kinds

CHUNK, BLOCK, WARPS = 65536, 2048, 4


@triton.jit
def _sum_chunk(
    pointer, start, numel, MASKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    squares = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    nonfinite = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, tl.minimum(CHUNK, numel - start), BLOCK):
        at = start + first + tl.arange(0, BLOCK)
        if MASKED:
            g = tl.load(pointer + at, mask=at < numel, other=0.0).to(tl.float32)
        else:
            g = tl.load(pointer + at).to(tl.float32)
        magnitude = tl.abs(g)
        finite = magnitude < float("inf")
        squares += g * g
        largest = tl.maximum(largest, tl.where(finite, magnitude, float("inf")))
        nonfinite += tl.where(finite, 0, 1)
    return tl.sum(squares), tl.max(largest), tl.sum(nonfinite)


@triton.jit
def _chunk_kernel(
    GRAD,
    NUMEL,
    KIND,
    CHUNK_TENSOR,
    CHUNK_INDEX,
    SQUARES,
    LARGEST,
    NONFINITE,
    KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Masked accesses go one by one: keep their tile small.
    TAIL: tl.constexpr = BLOCK // 4
    chunk = tl.program_id(0)
    tensor = tl.load(CHUNK_TENSOR + chunk)
    address = tl.load(GRAD + tensor)
    start = tl.load(CHUNK_INDEX + chunk).to(tl.int64) * CHUNK
    numel = tl.load(NUMEL + tensor)
    kind = tl.load(KIND + tensor)
    squares = 0.0
    largest = 0.0
    nonfinite = 0
    if address != 0:
        for k in tl.static_range(len(KINDS)):  # pyright: ignore
            if kind == k:
                pointer = address.to(tl.pointer_type(KINDS[k][0]))
                pointer = tl.multiple_of(pointer, 16) if KINDS[k][1] else pointer
                if start + CHUNK <= numel:
                    squares, largest, nonfinite = _sum_chunk(  # pyright: ignore
                        pointer, start, numel, False, CHUNK, BLOCK
                    )
                else:
                    squares, largest, nonfinite = _sum_chunk(  # pyright: ignore
                        pointer, start, numel, True, CHUNK, TAIL
                    )
    tl.store(SQUARES + chunk, squares)
    tl.store(LARGEST + chunk, largest)
    tl.store(NONFINITE + chunk, nonfinite)


@triton.jit
def _clip(norm, nonfinite, MAX_NORM, STATE, ZCLIP: tl.constexpr, DECAY, Z_LIMIT, WARMUP):
    """Clip coefficient; moves the ZClip state (mean, variance, steps) if all is finite."""
    finite = (nonfinite == 0) & (norm < float("inf"))
    threshold = tl.load(MAX_NORM)
    if ZCLIP:
        mean = tl.load(STATE + 0)
        variance = tl.load(STATE + 1)
        steps = tl.load(STATE + 2)
        warm = steps >= WARMUP
        deviation = tl.sqrt(variance) + 1e-6
        z = (norm - mean) / deviation
        spike = mean + Z_LIMIT * Z_LIMIT / tl.maximum(z, 1e-6) * deviation
        threshold = tl.where(warm & (z > Z_LIMIT), tl.minimum(threshold, spike), threshold)
        kept = tl.minimum(norm, threshold)
        # While warming up, the plain running mean and variance (Welford).
        rate = tl.where(warm, 1.0 - DECAY, 1.0 / (steps + 1.0))
        new_mean = mean + rate * (kept - mean)
        moving = variance + rate * ((kept - new_mean) * (kept - new_mean) - variance)
        running = variance + rate * ((kept - mean) * (kept - new_mean) - variance)
        new_variance = tl.where(warm, moving, running)
        tl.store(STATE + 0, tl.where(finite, new_mean, mean))
        tl.store(STATE + 1, tl.where(finite, new_variance, variance))
        tl.store(STATE + 2, tl.where(finite, steps + 1.0, steps))
    coefficient = tl.minimum(1.0, threshold / (norm + 1e-6))
    return tl.where(finite, coefficient, 1.0), finite


@triton.jit
def _segment_kernel(
    SQUARES,
    LARGEST,
    NONFINITE,
    SEGMENT,
    SCALE,
    MAX_NORM,
    STATE,
    NORM_OUT,
    LARGEST_OUT,
    CONTROL,
    decay,
    z_limit,
    warmup,
    ZCLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tensor, per group, and a last one for all of them and the clip decision."""
    segment = tl.program_id(0)
    first = tl.load(SEGMENT + 2 * segment)
    last = tl.load(SEGMENT + 2 * segment + 1)
    squares = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float32)
    nonfinite = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < last
        squares += tl.load(SQUARES + at, mask=inside, other=0.0).to(tl.float64)
        largest = tl.maximum(largest, tl.load(LARGEST + at, mask=inside, other=0.0))
        nonfinite += tl.load(NONFINITE + at, mask=inside, other=0)
    scale = tl.load(SCALE)
    norm = tl.sqrt(tl.sum(squares)).to(tl.float32) / scale
    tl.store(NORM_OUT + segment, norm)
    tl.store(LARGEST_OUT + segment, tl.max(largest) / scale)
    if segment == tl.num_programs(0) - 1:
        count = tl.sum(nonfinite)
        coefficient, finite = _clip(norm, count, MAX_NORM, STATE, ZCLIP, decay, z_limit, warmup)
        tl.store(CONTROL + 0, count.to(tl.float32))
        tl.store(CONTROL + 1, coefficient)
        tl.store(CONTROL + 2, scale / coefficient)
        tl.store(CONTROL + 3, tl.where(finite, 0.0, 1.0))


def launch_norms(
    chunks: ChunkTable,
    kinds: Kinds,
    grads: Tensor,
    segments: Tensor,
    moved_bytes: int,
    scale: Tensor,
    max_norm: Tensor,
    zclip: tuple[float, float, int, Tensor] | None,
    outputs: Sequence[Tensor],
) -> None:
    """Fills outputs: norms and largest magnitudes `[segments]`, control `[4]`.

    Args:
        chunks, kinds, grads: which gradients, and their addresses.
        segments: int32 `[tensors + groups + 1, 2]`, first and last chunk of each sum.
        moved_bytes: of all gradients.
        scale, max_norm: 0-dim.
        zclip: decay, z_limit, warmup, state `[3]`.
        outputs: control is nonfinite count, clip coefficient, scale / coefficient, skip.
    """
    norms, largest, control = outputs
    partial = norms.new_empty(2, chunks.chunks)
    nonfinite = norms.new_empty(chunks.chunks, dtype=torch.int32)
    if chunks.chunks:
        launch(
            _chunk_kernel,
            (chunks.chunks,),
            norms.device,
            *(grads, chunks.numel, kinds.index, chunks.tensor, chunks.index),
            *(partial[0], partial[1], nonfinite),
            moved_bytes=moved_bytes,
            KINDS=kinds.names,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    decay, z_limit, warmup, state = zclip or (0.0, 0.0, 0, norms)
    launch(
        _segment_kernel,
        (len(norms),),
        norms.device,
        partial[0],
        partial[1],
        nonfinite,
        segments,
        scale,
        max_norm,
        state,
        norms,
        largest,
        control,
        decay,
        z_limit,
        float(warmup),
        ZCLIP=zclip is not None,
        BLOCK=1024,
        num_warps=4,
    )
