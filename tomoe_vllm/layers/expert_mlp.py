"""The MLP of ToMoE in its two layouts, each with one copy of the weights; both are exact.

``masked``: gate_up and down are vLLM's own linears, with the routed expert's mask between them. Tensor parallelism,
quantization and LoRA work as for the dense model; no FLOP is saved. ``shared``: weights of our own with neurons as
rows, of which a token reads its expert's only (``layers/shared_mlp.py``).

``expert_layout`` of the config chooses (``--hf-overrides '{"expert_layout": "masked"}'``); by default, ``auto``, the
shared layout is taken wherever it works: weights neither quantized nor under LoRA; on a CPU float32 and a C++
compiler; on a GPU after `tomoe doctor` found its kernels right there.
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
from tomoe_vllm.kernels import native
from tomoe_vllm.kernels.expert_activation import expert_activation, require_activation
from tomoe_vllm.kernels.expert_mlp.verdict import read_verdict
from tomoe_vllm.layers.expert_gate import ToMoEExpertGate
from tomoe_vllm.layers.shared_mlp import ToMoESharedMLP

logger = logging.getLogger(__name__)

EXPERT_LAYOUTS = ("auto", "shared", "masked")


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
    if not native.load():
        return "its CPU kernels could not be compiled"
    return None


def obstacle_on_gpu(device: str) -> str | None:
    """Why the shared layout cannot be used on the GPU ``device`` (torch's name), or None and its kernels are loaded."""
    verdict = read_verdict(device)
    if verdict is None:
        return f"its GPU kernels were not checked on this {device}; run: tomoe doctor"
    if not verdict.agrees:
        return f"`tomoe doctor` found its GPU kernels wrong on this {device}: {verdict.failures[0]}"
    from tomoe_vllm.kernels.expert_mlp import cuda  # imports triton

    cuda.load()
    return None


def make_expert_mlp(
    config: PreTrainedConfig,
    layer_idx: int,
    *,
    bias: bool,
    quant_config: QuantizationConfig | None,
    prefix: str,
) -> nn.Module:
    """The MLP of one layer in the layout that ``config.expert_layout`` names, or the faster one that works.

    Raises ``ValueError`` for an unknown layout, one that cannot be used (saying why), an unsupported activation or
    a tensor parallel size that does not divide the neurons.
    """
    layout = getattr(config, "expert_layout", "auto")
    if layout not in EXPERT_LAYOUTS:
        raise ValueError(f"expert_layout is {layout!r}; it must be one of {', '.join(EXPERT_LAYOUTS)}")
    obstacle = obstacle_to_shared(quant_config) if layout != "masked" else "expert_layout is 'masked'"
    if layout == "shared" and obstacle is not None:
        raise ValueError(f"expert_layout is 'shared', but {obstacle}; use 'auto' or 'masked'")
    if layer_idx == 0:
        logger.info("ToMoE expert layout: %s", "shared" if obstacle is None else f"masked, because {obstacle}")
    if obstacle is None:
        return ToMoESharedMLP(config, layer_idx, has_bias=bias, prefix=prefix)
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

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        first, second = (self.gate_up_proj, self.down_proj) if self.is_gated else (self.fc1, self.fc2)
        expert_ids = self.expert_gate(hidden_states)
        projected, _ = first(hidden_states)
        hidden = expert_activation(projected, expert_ids, self.expert_gate.expert_masks, self.activation)
        output, _ = second(hidden)
        return output
