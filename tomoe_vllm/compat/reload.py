"""How vLLM reloads weights into a running engine (``reload_weights``, weight transfer), as far as ToMoE relies on it.

vLLM puts the tensors of all modules on the meta device, as they were after construction, and calls ``load_weights``.
It keeps the loaded tensors of a module until as many elements arrived as the module's parameters and buffers have;
what is still incomplete is processed at the end, in the order of ``modules()``. Processing a module means: allocate its
tensors, call their loaders, call ``quant_method.process_weights_after_loading``, and copy the parameters into the old
ones, whose addresses CUDA graphs contain. Buffers that are not persistent keep their old values. The hook of attention
layers runs after all of that, at the first load too; the hook of the model runs at the first load only.

So loaders only copy, and what is derived from several modules is computed in place in the hook of an attention layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.utils import set_weight_attrs

__all__ = ["HookedAttention", "is_reloading", "process_last", "restore_layers"]


class HookedAttention(Attention):
    """vLLM's attention layer, which calls ``after_loading`` whenever the weights of the whole model were loaded."""

    after_loading: Callable[[], None] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.after_loading is not None:
            self.after_loading()


def process_last(parameter: nn.Parameter) -> None:
    """When reloading, process the module of ``parameter`` after those that come before it in ``modules()``.

    vLLM then waits for one element more than the checkpoint has.
    """
    set_weight_attrs(parameter, {"weight_loader_numel": parameter.numel() + 1})


def is_reloading(model: nn.Module) -> bool:
    """Whether a loaded model is prepared for new weights: its parameters are on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


def restore_layers(model: nn.Module) -> None:
    """Abandon a reload: modules that are still on the meta device get their old tensors back."""
    for layer in model.modules():
        info: Any = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
            info.reset()
