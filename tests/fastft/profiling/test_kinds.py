"""Kinds of kernels by names that torch, cuBLAS, cuDNN, Inductor, NCCL and fastft really use."""

import pytest

from fastft.profiling.kinds import is_fp32_matmul, kernel_kind

FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>"
NAMES = {
    "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8": "matmul",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "matmul",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3>": "matmul",
    "void gemv2T_kernel_val<int, int, float, float>": "matmul",
    "triton_tem_fused_addmm_3": "matmul",
    FLASH: "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
    "triton_tem_fused_flex_attention_0": "attention",
    "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc": "convolution",
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float>": "convolution",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>": "norm",
    "void cudnn::bn_fw_tr_1C11_singleread<float, 512>": "norm",
    "triton_per_fused_add_native_layer_norm_5": "elementwise",
    "triton_poi_fused_gelu_2": "elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "elementwise",
    "void (anonymous namespace)::softmax_warp_forward<float>": "elementwise",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer",
    "Memcpy DtoD (Device -> Device)": "copies",
    "Memset (Device)": "copies",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage)": "communication",
    "my_kernel": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name: str) -> None:
    assert kernel_kind(name, "forward", []) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "phase", "operators", "kind"),
    [
        # Two kernels of fastft bear the same name.
        ("_forward_kernel", "forward", ["fastft::layer_norm_forward"], "norm"),
        ("_adam_kernel", "update", [], "optimizer"),
        ("reduce_kernel", "gradients", ["aten::sum"], "optimizer"),
        ("Memset (Device)", "update", [], "copies"),
        ("splitKreduce_kernel", "backward", ["aten::mm", "aten::matmul"], "matmul"),
        ("gemm", "forward", ["aten::cudnn_convolution", "aten::conv2d"], "convolution"),
        ("gemm", "forward", ["aten::bmm", "aten::_scaled_dot_product_attention_math"], "matmul"),
        ("unrolled_elementwise_kernel", "forward", ["aten::copy_", "aten::to"], "copies"),
        ("triton_poi_fused_0", "forward", ["aten::mm"], "elementwise"),
    ],
)
def test_by_phase_and_operator(name: str, phase: str, operators: list[str], kind: str) -> None:
    assert kernel_kind(name, phase, operators) == kind


def test_products_in_full_fp32() -> None:
    full = ["ampere_sgemm_128x64_tn", "sm80_xmma_gemm_f32f32_f32f32_f32", "cutlass_80_simt_sgemm"]
    fast = [
        "sm80_xmma_gemm_f32f32_tf32f32_f32",
        "cutlass_80_tensorop_s1688gemm_128x256",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32",
        FLASH,
    ]
    assert all(map(is_fp32_matmul, full))
    assert not any(map(is_fp32_matmul, fast))
