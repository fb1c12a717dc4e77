"""The MLP of ToMoE in one of three layouts of its experts; all are exact.

``masked``: gate_up and down are vLLM's own linears, with the routed expert's mask between them. Tensor parallelism,
quantization and LoRA work as for the dense model; no FLOP is saved. ``shared``: one copy of the weights with neurons as
rows, of which a token reads its expert's only (``layers/shared_mlp.py``). ``fused``: vLLM's fused MoE over one matrix
per expert, several times the memory (``layers/fused_mlp.py``).

``expert_layout`` of the config chooses (``--hf-overrides '{"expert_layout": "masked"}'``), by default ``auto``:
:func:`choose_layout`.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_activation import expert_activation, require_activation
from tomoe_vllm.kernels.expert_mlp.triton.validation import read_verdict
from tomoe_vllm.layers.mlp.fused import ToMoEFusedMLP, fused_parameters, obstacle_to_experts
from tomoe_vllm.layers.mlp.router import ToMoEExpertGate
from tomoe_vllm.layers.mlp.shared import ToMoESharedMLP

logger = logging.getLogger(__name__)

EXPERT_LAYOUTS = ("auto", "shared", "masked", "fused")
FUSED_MAX_DECODES = 2
"""Tokens up to which materialised experts read no more than the dense MLP (docs/performance.md)."""


def obstacle_to_shared(quant_config: QuantizationConfig | None) -> str | None:
    """Why the shared layout cannot be used for a model built now, or None."""
    if quant_config is not None:
        return f"the checkpoint is quantized ({quant_config.get_name()})"
    if get_current_vllm_config().lora_config is not None:
        return "LoRA adapters wrap vLLM's own linears"
    if current_platform.is_cuda():
        return obstacle_on_gpu(current_platform.get_device_name())
    if not current_platform.is_cpu():
        return "it has no kernels for this platform"
    if (dtype := torch.get_default_dtype()) != torch.float32:
        return f"its CPU kernels take float32 and the model's dtype is {str(dtype).removeprefix('torch.')}"
    if not build.load():
        return "its CPU kernels could not be compiled"
    return None


def obstacle_on_gpu(device: str) -> str | None:
    """Why the shared layout cannot be used on the GPU ``device`` (torch's name), or None and its kernels are loaded."""
    verdict = read_verdict(device)
    if verdict is None:
        return f"its GPU kernels were not checked on this {device}; run: tomoe doctor"
    if not verdict.agrees:
        return f"`tomoe doctor` found its GPU kernels wrong on this {device}: {verdict.failures[0]}"
    from tomoe_vllm.kernels.expert_mlp.triton import dispatch  # imports triton

    dispatch.load()
    return None


def obstacle_to_fused(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> str | None:
    """Why the fused layout cannot be used for a model built now, or None."""
    if quant_config is not None:
        return f"the checkpoint is quantized ({quant_config.get_name()})"
    if get_current_vllm_config().lora_config is not None:
        return "LoRA adapters wrap vLLM's own linears"
    return obstacle_to_experts(config)


def obstacle_to_fused_by_itself(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> str | None:
    """Why ``auto`` does not take the fused layout where the shared one cannot be used, or None.

    It reads more than the dense model as soon as some three tokens are decoded at once, so it has to be certain that
    no more are; and its experts may take half of the free memory at most: the other half is for the KV cache.
    """
    if (obstacle := obstacle_to_fused(config, quant_config)) is not None:
        return obstacle
    if not current_platform.is_cuda():
        return "only on GPUs is it worth its memory"
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


def choose_layout(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> tuple[str, str]:
    """The layout that ``config.expert_layout`` asks for, and why, in a few words.

    ``auto``: shared where it works; else fused on a GPU with memory to spare that never decodes more than
    ``FUSED_MAX_DECODES`` sequences at once; else masked. On a CPU it is never fused.

    Raises ``ValueError`` for an unknown layout, or one that cannot be used (saying why).
    """
    layout = getattr(config, "expert_layout", "auto")
    if layout not in EXPERT_LAYOUTS:
        raise ValueError(f"expert_layout is {layout!r}; it must be one of {', '.join(EXPERT_LAYOUTS)}")
    if layout == "masked":
        return layout, "expert_layout asks for it"
    obstacle = obstacle_to_fused(config, quant_config) if layout == "fused" else obstacle_to_shared(quant_config)
    if layout == "auto":
        if obstacle is None:
            return "shared", "its kernels work here"
        not_fused = obstacle_to_fused_by_itself(config, quant_config)
        if not_fused is None:
            return "fused", f"shared cannot be used ({obstacle}) and there is memory to spare"
        return "masked", f"shared cannot be used ({obstacle}), nor fused ({not_fused})"
    if obstacle is not None:
        raise ValueError(f"expert_layout is {layout!r}, but {obstacle}; use 'auto' or 'masked'")
    return layout, "expert_layout asks for it"


def make_expert_mlp(
    config: PreTrainedConfig,
    layer_idx: int,
    *,
    bias: bool,
    quant_config: QuantizationConfig | None,
    prefix: str,
) -> nn.Module:
    """The MLP of one layer in the layout of :func:`choose_layout`, which the first layer logs in one line.

    Raises ``ValueError`` for a layout that is unknown or cannot be used, an unsupported activation or a tensor
    parallel size that does not divide the neurons.
    """
    layout, reason = choose_layout(config, quant_config)
    if layer_idx == 0:
        logger.info("ToMoE expert layout: %s, because %s", layout, reason)
    if layout == "shared":
        return ToMoESharedMLP(config, layer_idx, has_bias=bias, prefix=prefix)
    if layout == "fused":
        return ToMoEFusedMLP(config, layer_idx, has_bias=bias, prefix=prefix)
    return ToMoEMaskedMLP(config, layer_idx, bias=bias, quant_config=quant_config, prefix=prefix)


class ToMoEMaskedMLP(nn.Module):
    """gate_up_proj and down_proj, or fc1 and fc2 where the family has no gate, around the expert activation.

    Raises ``ValueError`` for an unsupported activation or a tensor parallel size that does not divide the
    neurons.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        require_activation(config.hidden_act)
        self.activation = config.hidden_act
        self.is_gated = block_shape(config).num_mlp_matrices == 3
        self.expert_gate = ToMoEExpertGate(config, layer_idx, f"{prefix}.expert_gate")
        hidden, neurons = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {"bias": bias, "quant_config": quant_config}
        if self.is_gated:
            self.gate_up_proj = MergedColumnParallelLinear(
                hidden, [neurons] * 2, prefix=f"{prefix}.gate_up_proj", **options
            )
            self.down_proj = RowParallelLinear(neurons, hidden, prefix=f"{prefix}.down_proj", **options)
        else:
            self.fc1 = ColumnParallelLinear(hidden, neurons, prefix=f"{prefix}.fc1", **options)
            self.fc2 = RowParallelLinear(neurons, hidden, prefix=f"{prefix}.fc2", **options)

    def step_path(self, num_tokens: int) -> str:
        """The way a step of ``num_tokens`` takes through the weights: here always all of them."""
        return "masked"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        first, second = (self.gate_up_proj, self.down_proj) if self.is_gated else (self.fc1, self.fc2)
        expert_ids = self.expert_gate(hidden_states)
        projected, _ = first(hidden_states)
        hidden = expert_activation(projected, expert_ids, self.expert_gate.expert_masks, self.activation)
        output, _ = second(hidden)
        return output
