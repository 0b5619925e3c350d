"""Compiles every kernel for compute capability 9.0, which needs no GPU; run by test_compiles."""

import importlib
import itertools
from typing import Any

import triton
import triton.language as tl
from fastft_kernels.tensor_table import TRITON_DTYPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY_BYTES = 232448
INTEGERS = ("rows", "length", "programs", "tensors", "seed", "samples", "heads", "windows")
INTEGERS += ("C", "H", "W", "CP", "HP", "WP", "SC", "SH", "SW")
FLOATS = ("eps", "decay", "z_limit", "warmup", "scale")
WEIGHTED = ("forward", "backward", "double_backward")
POINTERS = {
    **dict.fromkeys(("X", "RESIDUAL", "S", "Y", "DY", "DS", "DX", "SCALE", "SHIFT"), "*bf16"),
    **dict.fromkeys(("PARAM", "MOMENTS", "NUMEL"), "*i64"),
    **dict.fromkeys(("GROUP", "KIND", "CHUNK_TENSOR", "CHUNK_INDEX", "SEGMENT"), "*i32"),
    **dict.fromkeys(("QKV", "DQKV", "OUT", "Q", "KV", "DKV"), "*bf16"),
    "NONFINITE": "*i32",
    "GRAD": "*i64",
}


def kind_of(name: str) -> str:
    if name in INTEGERS or name.endswith("_stride"):
        return "i32"
    return "fp32" if name in FLOATS else POINTERS.get(name, "*fp32")


def compile_kernel(
    module: str,
    name: str,
    warps: int = 4,
    pointer: Any = None,
    stages: int = 3,
    **constants: Any,
) -> None:
    kernel = getattr(importlib.import_module(f"fastft_kernels.{module}"), name)
    signature, constexprs = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            constexprs[(i,)] = constants[argument]
        kind = "constexpr" if argument in constants else kind_of(argument)
        signature[argument] = pointer if pointer and kind.startswith("*") else kind
    target = GPUTarget("cuda", 90, 32)
    source = ASTSource(kernel, signature, constexprs, {})
    built = triton.compile(
        source, target=target, options={"num_warps": warps, "num_stages": stages}
    )
    assert built.metadata.shared <= SHARED_MEMORY_BYTES, (module, name, built.metadata.shared)


def main() -> None:
    rows = {"N": 500, "BLOCK_N": 512, "ROWS": 4}
    for flag in (False, True):
        affine = {"HAS_RESIDUAL": True, "HAS_WEIGHT": flag, "HAS_BIAS": True, "EARLY": flag}
        compile_kernel("layer_norm", "_forward_kernel", **rows, **affine)
        compile_kernel("long_rows", "forward_in_passes", N=5000, CHUNK=2048, **affine)
        flags = {"STAGES": 3 if flag else 1, "PERSISTENT": flag, "HAS_RESIDUAL": True}
        flags["EARLY"] = not flag
        compile_kernel("adaptive_norm", "_forward_kernel", **rows, **flags)
    flags = {"HAS_DS": True, "HAS_WEIGHT": True, "WANTS_SUMS": True}
    loop = {"STAGES": 4, "EARLY": True}
    compile_kernel("layer_norm", "_backward_kernel", **rows, **flags, **loop)
    compile_kernel("adaptive_norm", "_backward_kernel", **rows, **loop)
    sums = {"BLOCK_P": 256, "BLOCK_N": 32, "EARLY": True}
    compile_kernel("partial_sums", "_sum_partials_kernel", N=500, **sums)
    longitudes = {"SHIFTED": True, "WRAPS": True, "PADDED": True}
    window = {"T": 144, "WC": 2, "WH": 6, "WW": 12, "D": 64, **longitudes}
    # Also the most that a window may have.
    widest = {"T": 256, "WC": 4, "WH": 8, "WW": 8, "D": 128, **longitudes}
    for part, bias in (("forward", {"HAS_BIAS": False}), ("queries_backward", {})):
        parts = {"MAIN": 128, "TAIL": 16, "ROWS": 64}
        compile_kernel("window_kernels", part, stages=1, **window, **parts, **bias)
    parts = {"MAIN": 256, "TAIL": 0, "ROWS": 64}
    compile_kernel("window_kernels", "queries_backward", stages=1, **widest, **parts)
    compile_kernel("window_kernels", "keys_backward", **window, KEYS=64, ROWS=16)
    images = {"SHIFTED": True, "WRAPS": False, "PADDED": False}
    swin = {"T": 49, "WC": 1, "WH": 7, "WW": 7, "D": 32, **images}
    parts = {"MAIN": 64, "TAIL": 0, "ROWS": 64, "HAS_BIAS": True}
    compile_kernel("window_kernels", "forward", stages=1, **swin, **parts)
    largest = {"T": 64, "WC": 4, "WH": 4, "WW": 4, "D": 128, **longitudes}
    for small, has_bias in ((swin, True), (largest, True), (largest, False)):
        parts = {"BLOCK": 64, "HAS_BIAS": has_bias}
        compile_kernel("window_kernels", "small_backward", stages=2, **small, **parts)
    parts = {"BLOCK": 64, "HAS_BIAS": True}
    compile_kernel("window_kernels", "small_backward", 16, "*fp32", 1, **swin, **parts)
    short = {"LQ": 13, "LK": 3, "D": 64, "BLOCK_Q": 16, "BLOCK_K": 16, "SHARED": True}
    for part in ("_forward_kernel", "_backward_kernel"):
        compile_kernel("short_attention", part, 1, **short)
    weighted = {"T": 56, "D": 16, "BLOCK": 64}
    for part, precision in itertools.product(WEIGHTED, ("ieee", "tf32")):
        compile_kernel("weighted_kernels", part, 4, "*fp32", **weighted, PRECISION=precision)
    compile_kernel("adam", "_prepare_kernel", HYPER_COLUMNS=7, SCALAR_COLUMNS=8, BLOCK=256)
    dtypes = [TRITON_DTYPES[d] for d in TRITON_DTYPES]
    kinds = ((tl.float32, tl.float32, True), (dtypes[1], dtypes[2], False))
    chunk = {"CHUNK": 1024, "BLOCK": 512}
    for layout in ("fp32", "bf16", "8bit"):
        flags = {"LAYOUT": layout, "STATISTICS": True, "SCALAR_COLUMNS": 8, "STAGES": 1}
        compile_kernel("adam", "_adam_kernel", KINDS=kinds, **flags, **chunk)
    kinds = tuple((dtype, aligned) for dtype in dtypes for aligned in (True, False))
    compile_kernel("gradient_norm", "_chunk_kernel", KINDS=kinds, **chunk)
    for zclip in (False, True):
        compile_kernel("gradient_norm", "_segment_kernel", ZCLIP=zclip, BLOCK=1024)
    print("compiled")


if __name__ == "__main__":
    main()
