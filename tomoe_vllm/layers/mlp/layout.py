"""Chooses the layout of the experts' weights for a model. All three layouts give the same output.

    masked   vLLM's own linears with the routed expert's mask between them (``masked.py``). Tensor parallelism,
             quantization and LoRA work as for the dense model; it saves nothing
    shared   one copy of the weights, one row per neuron; each token reads the rows of its expert only (``shared.py``)
    fused    vLLM's fused MoE with one matrix per expert, at several times the memory (``fused.py``)

``expert_layout`` of the config chooses (``--hf-overrides '{"expert_layout": "masked"}'``). The default is ``auto``:
:func:`choose_layout`. Within the shared layout ``kernels/expert_mlp/triton/dispatch.py`` chooses the GPU kernel of
each step; CPUs have one kernel.
"""

import logging

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_mlp.triton import dispatch
from tomoe_vllm.layers.mlp.fused import CPU_MULTIPLE, ToMoEFusedMLP, fused_parameters
from tomoe_vllm.layers.mlp.masked import ToMoEMaskedMLP
from tomoe_vllm.layers.mlp.shared import ToMoESharedMLP

logger = logging.getLogger(__name__)

EXPERT_LAYOUTS = ("auto", "shared", "masked", "fused")
FUSED_MAX_DECODES = 2
"""Decoding this many tokens at once, one matrix per expert reads no more than the dense MLP (docs/performance.md)."""


def choose_layout(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> tuple[str, str]:
    """The layout to build for ``config.expert_layout``, and the reason in a few words.

    ``auto`` takes ``shared`` where it is available. Otherwise it takes ``fused`` on a GPU with enough free memory
    that never decodes more than ``FUSED_MAX_DECODES`` sequences at once, and ``masked`` everywhere else. On a CPU
    ``auto`` never takes ``fused``.

    Raises ``ValueError`` for an unknown layout, or for one that is unavailable, with the reason.
    """
    layout = getattr(config, "expert_layout", "auto")
    if layout not in EXPERT_LAYOUTS:
        raise ValueError(f"expert_layout is {layout!r}; it must be one of {', '.join(EXPERT_LAYOUTS)}")
    if layout == "auto":
        not_shared = why_not_shared(quant_config)
        if not_shared is None:
            return "shared", "its kernels work here"
        not_fused = why_not_fused_in_auto(config, quant_config)
        if not_fused is None:
            return "fused", f"shared is unavailable ({not_shared}) and there is enough free memory"
        return "masked", f"shared is unavailable ({not_shared}), and so is fused ({not_fused})"
    reason = None
    if layout == "shared":
        reason = why_not_shared(quant_config)
    elif layout == "fused":
        reason = why_not_fused(config, quant_config)
    if reason is not None:
        raise ValueError(f"expert_layout is {layout!r}, but {reason}; use 'auto' or 'masked'")
    return layout, "expert_layout asks for it"


def make_expert_mlp(
    config: PreTrainedConfig,
    layer_idx: int,
    *,
    bias: bool,
    quant_config: QuantizationConfig | None,
    prefix: str,
) -> nn.Module:
    """Build the MLP of one layer in the layout of :func:`choose_layout`. The first layer logs the choice.

    Raises ``ValueError`` for a layout that is unknown or unavailable, an unsupported activation, or a tensor parallel
    size that does not divide the neurons.
    """
    layout, reason = choose_layout(config, quant_config)
    if layer_idx == 0:
        logger.info("ToMoE expert layout: %s, because %s", layout, reason)
    if layout == "shared":
        return ToMoESharedMLP(config, layer_idx, has_bias=bias, prefix=prefix)
    if layout == "fused":
        return ToMoEFusedMLP(config, layer_idx, has_bias=bias, prefix=prefix)
    return ToMoEMaskedMLP(config, layer_idx, bias=bias, quant_config=quant_config, prefix=prefix)


def _why_only_vllm_linears(quant_config: QuantizationConfig | None) -> str | None:
    """Why this model needs vLLM's own linears, or None."""
    if quant_config is not None:
        return f"the checkpoint is quantized ({quant_config.get_name()})"
    if get_current_vllm_config().lora_config is not None:
        return "LoRA adapters wrap vLLM's own linears"
    return None


def why_not_shared(quant_config: QuantizationConfig | None) -> str | None:
    """Why the shared layout is unavailable for the model that is being built, or None."""
    if (reason := _why_only_vllm_linears(quant_config)) is not None:
        return reason
    if current_platform.is_cuda():
        return why_not_shared_on_gpu(current_platform.get_device_name())
    if not current_platform.is_cpu():
        return "it has no kernels for this platform"
    if (dtype := torch.get_default_dtype()) != torch.float32:
        return f"its CPU kernels take float32 and the model's dtype is {str(dtype).removeprefix('torch.')}"
    if not build.load():
        return "its CPU kernels could not be compiled"
    return None


def why_not_shared_on_gpu(device: str) -> str | None:
    """Why the shared layout is unavailable on the GPU ``device`` (torch's name). None: the GPU op is registered."""
    validation = dispatch.read_validation(device)
    if validation is None:
        return f"its GPU kernels were not checked on this {device}; run: tomoe doctor"
    if not validation.agrees:
        return f"`tomoe doctor` found its GPU kernels wrong on this {device}: {validation.failures[0]}"
    dispatch.register()
    return None


def why_not_fused(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> str | None:
    """Why the fused layout is unavailable for the model that is being built, or None."""
    if (reason := _why_only_vllm_linears(quant_config)) is not None:
        return reason
    if block_shape(config).num_mlp_matrices != 3:
        return "vLLM's fused MoE needs an MLP with a gate"
    if config.hidden_act != "silu":
        return f"only silu was tested in vLLM's fused MoE and hidden_act is {config.hidden_act!r}"
    if current_platform.is_cpu() and config.hidden_size % CPU_MULTIPLE:
        return f"vLLM's CPU kernel needs a hidden_size divisible by {CPU_MULTIPLE}; it is {config.hidden_size}"
    return None


def why_not_fused_in_auto(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> str | None:
    """Why ``auto`` does not choose the fused layout, or None.

    From about three tokens per decode step the fused layout reads more than the dense model, so the number of
    sequences must be bounded. Its experts may take at most half of the free memory; the rest is for the KV cache.
    """
    if (reason := why_not_fused(config, quant_config)) is not None:
        return reason
    if not current_platform.is_cuda():
        return "it is worth its memory on GPUs only"
    max_num_seqs = get_current_vllm_config().scheduler_config.max_num_seqs
    if max_num_seqs > FUSED_MAX_DECODES:
        return (
            f"up to {max_num_seqs} sequences are decoded at once (--max-num-seqs), and with more than "
            f"{FUSED_MAX_DECODES} it reads more than the dense model"
        )
    needed = fused_parameters(config) * torch.get_default_dtype().itemsize
    free, _ = torch.cuda.mem_get_info()
    if needed > free / 2:
        return f"its experts need {needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB that are free"
    return None
