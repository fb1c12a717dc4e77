"""Private names of vLLM that ToMoE's layers build on."""

from functools import cache
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


@cache
def diffkv_backend(head_size_v: int) -> type:
    """vLLM's Triton attention backend for keys and values of different sizes, with values of ``head_size_v``.

    vLLM keeps the value size on the backend class, one for the process, and reads it there in the metadata builder and
    in each forward pass. The classes returned here set it before each of these, so two models of one process (a draft
    model) may differ.
    """
    vllm_backend: Any = AttentionBackendEnum.TRITON_ATTN_DIFFKV.get_class()
    vllm_builder: Any = vllm_backend.get_builder_cls()
    vllm_impl: Any = vllm_backend.get_impl_cls()

    class Builder(vllm_builder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            vllm_backend.set_head_size_v(head_size_v)
            super().__init__(*args, **kwargs)

    class Impl(vllm_impl):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            vllm_backend.set_head_size_v(head_size_v)
            return super().forward(*args, **kwargs)

    members = {
        "head_size_v": head_size_v,
        "get_builder_cls": staticmethod(lambda: Builder),
        "get_impl_cls": staticmethod(lambda: Impl),
        "__module__": __name__,
    }
    return type(f"DiffKVBackend{head_size_v}", (vllm_backend,), members)  # vLLM groups layers by the name of the class
