"""What kind of work a kernel or an operator is: by phase, operator and name, in this order."""

import re
from collections.abc import Iterable

# In the order of the charts.
KINDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "convolution": "convolutions",
    "norm": "norms",
    "elementwise": "elementwise and reductions",
    "optimizer": "optimizer and gradient norms",
    "copies": "copies and fills",
    "communication": "communication",
    "other": "other kernels",
}

# Around everything in the backward pass, named after the function whose gradients it passes on.
ENGINE = "autograd::engine"

# Kernels are named by many authors; an operator's name says more, where one launched the kernel.
_OPERATORS = (
    ("convolution", r"convolution|conv\d|conv_transpose"),
    ("attention", r"attention"),
    ("norm", r"(layer|batch|group|instance|rms|adaptive)_?norm"),
    ("optimizer", r"gradient_norm|_fused_adam|_fused_sgd|_foreach_norm"),
    ("matmul", r"::(_?addmm\w*|mm|bmm|baddbmm|_scaled_mm|_linear_pointwise|_mkl_linear|dot|mv)$"),
    ("copies", r"::(_to_copy|copy_|_foreach_copy_|zero_|fill_|clone)$"),
)
_KERNELS = (
    ("communication", r"nccl"),
    ("copies", r"^(memcpy|memset)\b|direct_copy_kernel|FillFunctor"),
    ("attention", r"triton_tem_\w*attention"),
    ("matmul", r"triton_tem_"),
    # What Inductor fuses is elementwise around whatever its name lists.
    ("elementwise", r"triton_(poi|red|per|for)_"),
    ("optimizer", r"adam|sgd|LpNorm|multi_tensor_apply"),
    ("attention", r"flash|fmha|attention|sdpa|mem_eff"),
    ("convolution", r"conv|fprop|dgrad|wgrad|winograd|nchwToNhwc|nhwcToNchw"),
    ("norm", r"(layer|batch|group|instance|rms)_?norm|\bbn_(fw|bw)|GammaBetaBackward"),
    ("matmul", r"gemm|gemv|nvjet|cutlass|cublas|splitK|matmul|wgmma"),
    (
        "elementwise",
        r"elementwise|reduce|softmax|cat|index|gather|scatter|embedding|dropout|distribution"
        r"|nll_loss|cross_entropy|sort|scan|arange|tril|triu|upsample|pool|foreach",
    ),
)
_COMPILED_OPERATORS = tuple((kind, re.compile(p, re.IGNORECASE)) for kind, p in _OPERATORS)
_COMPILED_KERNELS = tuple((kind, re.compile(p, re.IGNORECASE)) for kind, p in _KERNELS)

# cuBLAS and CUTLASS name their kernels by the types of operands and accumulator.
_FP32_MATMUL = re.compile(r"sgemm|simt|f32f32_f32f32|gemmSN", re.IGNORECASE)
_NOT_FP32 = re.compile(r"tf32|tensorop|f16|bf16", re.IGNORECASE)


def kernel_kind(name: str, phase: str, operators: Iterable[str]) -> str:
    """The kind of a kernel, a copy or a fill.

    Args:
        phase: in which it was launched.
        operators: names of the operators that launched it, the innermost first.
    """
    by_name = _first(_COMPILED_KERNELS, name)
    if by_name == "communication" or name.lower().startswith(("memcpy", "memset")):
        return by_name or "copies"
    if phase in ("gradients", "update"):
        return "optimizer"
    # A fused kernel belongs to no one operator.
    if name.startswith("triton_"):
        return by_name or "elementwise"
    return operators_kind(operators) or by_name or "other"


def operators_kind(names: Iterable[str]) -> str | None:
    """The kind of the innermost operator that has one."""
    own = (name for name in names if not name.startswith(ENGINE))
    return next((kind for name in own if (kind := _first(_COMPILED_OPERATORS, name))), None)


def is_fp32_matmul(name: str) -> bool:
    """Whether a kernel multiplies in full fp32, without tensor cores."""
    return bool(_FP32_MATMUL.search(name)) and not _NOT_FP32.search(name)


def _first(rules: Iterable[tuple[str, re.Pattern[str]]], name: str) -> str | None:
    return next((kind for kind, pattern in rules if pattern.search(name)), None)
