"""The moments of `FusedAdam` on the host's side: made, read and written in plain torch."""

import torch
from torch import Tensor

from fastft_kernels.device import ceil_div
from fastft_kernels.rounding import (
    BLOCK_ELEMENTS,
    decode_moment,
    encode_moment,
    random_bits_cpu,
    round_to_bf16_cpu,
)
from fastft_kernels.tensor_table import flat

MOMENTS = ("exp_avg", "exp_avg_sq")
LOW_WORD = 0xFFFFFFFF


def step_seed(seed: int, step: int, tensor: int) -> int:
    """The seed of one tensor's rounding at one step, as the kernel mixes it."""
    mixed = int(random_bits_cpu(torch.tensor(step), seed & LOW_WORD))
    return int(random_bits_cpu(torch.tensor(tensor), mixed))


def new_moments(like: Tensor, layout: str) -> dict[str, Tensor]:
    """Zero moments of a parameter in the given layout, in the parameter's order of memory."""
    if layout != "8bit":
        dtype = torch.float32 if layout == "fp32" else torch.bfloat16
        return {name: torch.zeros_like(like, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
    state = {}
    for name, span in (("exp_avg", 16), ("exp_avg_sq", 32)):
        exponents = ceil_div(like.numel(), BLOCK_ELEMENTS)
        state[name] = torch.zeros_like(like, dtype=torch.uint8)
        state[f"{name}_exponent"] = like.new_full((exponents,), span, dtype=torch.uint8)
    return state


def read_moment(state: dict[str, Tensor], name: str, layout: str) -> Tensor:
    """One moment in float32, flat, in order of memory."""
    if layout == "8bit":
        return decode_moment(flat(state[name]), state[f"{name}_exponent"], name == "exp_avg")
    return flat(state[name]).float()


def write_moments(state: dict[str, Tensor], m: Tensor, v: Tensor, layout: str, seed: int) -> None:
    """Stores flat float32 moments, rounded with the bits the kernel would draw."""
    bits = random_bits_cpu(torch.arange(m.numel()), seed) if layout != "fp32" else None
    for name, value, shift in zip(MOMENTS, (m, v), (0, 16), strict=True):
        if bits is not None:
            bits16 = (bits >> shift) & 0xFFFF
            if layout == "8bit":
                value, exponents = encode_moment(value, bits16, name == "exp_avg")
                state[f"{name}_exponent"].copy_(exponents)
            else:
                value = round_to_bf16_cpu(value, bits16)
        flat(state[name]).copy_(value)
