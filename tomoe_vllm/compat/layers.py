"""Private names of vLLM that ToMoE's layers build on."""

from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backends.registry import AttentionBackendEnum

__all__ = [
    "FusedMoEFactory",
    "RotaryEmbedding",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "diffkv_backend",
    "replace_quant_method",
    "routed_experts",
]


def replace_quant_method(layer: nn.Module, method: Any) -> None:
    """Let ``method`` finish loading and run a built, unquantized ``layer``.

    Linears and ``FusedMoEFactory`` create their method themselves and take none as an argument, so the attribute
    ``quant_method`` is set after construction, as in vLLM's own ``GateLinear``. Raises ``TypeError`` unless the class
    of the present method is a base of the new one's.
    """
    present = type(getattr(layer, "quant_method", None))
    if not isinstance(method, present):
        raise TypeError(f"{type(layer).__name__}.quant_method is a {present.__name__}; {type(method).__name__} is not")
    layer.quant_method = method


def routed_experts(fused_moe: nn.Module) -> nn.Module:
    """The module of a ``FusedMoEFactory`` that holds the weights of the experts and their ``quant_method``."""
    return fused_moe.routed_experts


def diffkv_backend(head_size_v: int) -> type:
    """vLLM's Triton attention backend with a value head size of its own.

    The backend keeps its value head size on the class, and vLLM's own models (mimo_v2, openpangu) set it in this way,
    so all layers of a process must have the same.
    """
    backend = AttentionBackendEnum.TRITON_ATTN_DIFFKV.get_class()
    backend.set_head_size_v(head_size_v)
    return backend
