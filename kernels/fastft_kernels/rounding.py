"""Narrow storage of optimizer moments: stochastic rounding to bf16, and 8-bit block floating point.

The 8-bit format: 128 neighbours share one exponent byte E, two above that of the largest
magnitude's power of two at most; an element is a minifloat with 3 mantissa bits and 15 (signed) or
31 (unsigned) exponents below E. Code 0 is zero. Decoding is exact in float32, encoding a decoded
value returns its code, and rounding is stochastic, so that its mean is the value: an average with
beta2 = 0.999 moves by less than half a code per step and would stand still if rounded to nearest.

Random bits come from a hash of (seed, index): no generator state, the same bits after a resume.
Source: the hash is lowbias32 (C. Wellons, github.com/skeeto/hash-prospector).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

QUANTUM = tl.constexpr(128)
BLOCK_ELEMENTS = 128


@triton.jit
def random_bits(index, seed):
    """32 random bits per element of index (uint32)."""
    x = index * 0x9E3779B9 + seed
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def round_to_bf16(x, bits16):
    """float32 to bf16, up or down with the probability that keeps the mean."""
    rounded = (x.to(tl.uint32, bitcast=True) + bits16) >> 16
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode(code, exponent, SIGNED: tl.constexpr):
    """codes `[R, 128]` and exponents `[R]`, both uint8, to float32."""
    span: tl.constexpr = tl.constexpr(16 if SIGNED else 32)
    code = code.to(tl.int32)
    magnitude = code & 127 if SIGNED else code
    base = (exponent.to(tl.int32) - (span - 1)) << 3
    value = ((magnitude + base[:, None]) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude == 0, 0.0, value)
    if SIGNED:
        value = tl.where(code > 127, -value, value)
    return value


@triton.jit
def encode(x, bits16, SIGNED: tl.constexpr):
    """float32 `[R, 128]` to (codes, exponents) as uint8, rounded stochastically."""
    span: tl.constexpr = tl.constexpr(16 if SIGNED else 32)
    magnitude = tl.abs(x).to(tl.int32, bitcast=True)
    # One exponent of headroom, so that rounding the largest up still has a code.
    exponent = tl.minimum(tl.maximum((tl.max(magnitude, axis=1) >> 23) + 1, span), 254)
    base = (exponent - (span - 1)) << 3
    smallest = (base + 1) << 20
    bits = bits16.to(tl.int32)
    code = ((magnitude + (bits << 4)) >> 20) - base[:, None]
    chance = tl.abs(x) * (65536.0 / smallest.to(tl.float32, bitcast=True))[:, None]
    below = tl.where(chance > bits.to(tl.float32), 1, 0)
    code = tl.where(magnitude < smallest[:, None], below, tl.minimum(code, span * 8 - 1))
    if SIGNED:
        code = tl.where(x < 0, code + 128, code)
    return code.to(tl.uint8), exponent.to(tl.uint8)


def random_bits_cpu(index: Tensor, seed: int) -> Tensor:
    """`random_bits`, as int64."""
    low = 0xFFFFFFFF
    x = (index * 0x9E3779B9 + seed) & low
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & low
    x = ((x ^ (x >> 15)) * 0x735A2D97) & low
    return x ^ (x >> 15)


def round_to_bf16_cpu(x: Tensor, bits16: Tensor) -> Tensor:
    """`round_to_bf16` in plain torch."""
    rounded = (x.float().contiguous().view(torch.int32) + bits16.int()) & ~0xFFFF
    return rounded.view(torch.float32).bfloat16()


def decode_moment(code: Tensor, exponent: Tensor, signed: bool) -> Tensor:
    """Codes `[n]` and exponents `[ceil(n / 128)]` to float32 `[n]`, on any device."""
    span = 16 if signed else 32
    wide = code.int()
    magnitude = wide & 127 if signed else wide
    base = (exponent.int() - (span - 1)) << 3
    base = base.repeat_interleave(BLOCK_ELEMENTS)[: code.numel()]
    value = ((magnitude + base) << 20).view(torch.float32).masked_fill(magnitude == 0, 0.0)
    return torch.where(wide > 127, -value, value) if signed else value


def encode_moment(x: Tensor, bits16: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 `[n]` to (codes `[n]`, exponents), on any device; exact for decoded values."""
    span, count = 16 if signed else 32, x.numel()
    pad = (0, -count % BLOCK_ELEMENTS)
    x = torch.nn.functional.pad(x.float(), pad).view(-1, BLOCK_ELEMENTS)
    bits = torch.nn.functional.pad(bits16.int(), pad).view(-1, BLOCK_ELEMENTS)
    magnitude = x.abs().view(torch.int32)
    exponent = ((magnitude >> 23).amax(1, keepdim=True) + 1).clamp(span, 254)
    base = (exponent - (span - 1)) << 3
    smallest = (base + 1) << 20
    code = (((magnitude + (bits << 4)) >> 20) - base).clamp(max=span * 8 - 1)
    chance = x.abs() * (65536.0 / smallest.view(torch.float32))
    code = torch.where(magnitude < smallest, (chance > bits.float()).int(), code)
    if signed:
        code = torch.where(x < 0, code + 128, code)
    return code.to(torch.uint8).view(-1)[:count].clone(), exponent.to(torch.uint8).view(-1)
