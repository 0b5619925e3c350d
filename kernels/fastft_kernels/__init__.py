"""Fused Triton kernels for training: norms, attention of special shapes, Adam, gradient norm."""

from fastft_kernels.adaptive_norm import adaptive_layer_norm as adaptive_layer_norm
from fastft_kernels.fused_adam import FusedAdam as FusedAdam
from fastft_kernels.layer_norm import layer_norm as layer_norm
from fastft_kernels.layer_norm import residual_layer_norm as residual_layer_norm
from fastft_kernels.modules import FusedLayerNorm as FusedLayerNorm
from fastft_kernels.modules import SwapReport as SwapReport
from fastft_kernels.modules import use_fused_layer_norm as use_fused_layer_norm
from fastft_kernels.norm_and_clip import GradientNorm as GradientNorm
from fastft_kernels.norm_and_clip import GradientNorms as GradientNorms
from fastft_kernels.norm_and_clip import ZClip as ZClip
from fastft_kernels.norm_and_clip import gradient_norms as gradient_norms
from fastft_kernels.short_attention import short_attention as short_attention
from fastft_kernels.weighted_attention import weighted_attention as weighted_attention
from fastft_kernels.window_attention import window_attention as window_attention
