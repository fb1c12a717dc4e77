"""Compiled operators of vLLM, most of them of its CPU build.

Call ``current_platform.import_kernels()`` before the first use.
"""

from vllm._custom_ops import (
    cpu_fused_moe,
    cpu_prepack_moe_weight,
    create_onednn_mm,
    fused_add_rms_norm,
    onednn_mm,
    rms_norm,
    rotary_embedding,
)

__all__ = [
    "cpu_fused_moe",
    "cpu_prepack_moe_weight",
    "create_onednn_mm",
    "fused_add_rms_norm",
    "onednn_mm",
    "rms_norm",
    "rotary_embedding",
]
