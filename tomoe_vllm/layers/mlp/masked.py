"""The ``masked`` layout: vLLM's own linears with the routed expert's mask between them ("pseudo-MoE", appendix B.3).

Tensor parallelism, quantization and LoRA work as for the dense model. It saves no FLOP and no memory traffic.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.kernels.expert_activation import expert_activation, require_activation
from tomoe_vllm.layers.mlp.router import ToMoERouter


class ToMoEMaskedMLP(nn.Module):
    """gate_up_proj and down_proj (fc1 and fc2 in families without a gate) around the expert activation.

    Raises ``ValueError`` for an unsupported activation, or a tensor parallel size that does not divide the neurons.
    """

    why_not_reloadable: str | None = None

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
        self.expert_gate = ToMoERouter(config, layer_idx, f"{prefix}.expert_gate")
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
        """Execution path of a step of ``num_tokens``, as metrics name it."""
        return "masked"

    def finish_loading(self) -> None:
        """Set the masks after loading."""
        self.expert_gate.set_masks(self.expert_gate.masks())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """MLP of T tokens: [T, D] -> [T, D]."""
        first, second = (self.gate_up_proj, self.down_proj) if self.is_gated else (self.fc1, self.fc2)
        expert_ids = self.expert_gate(hidden_states)
        projected, _ = first(hidden_states)
        hidden = expert_activation(projected, expert_ids, self.expert_gate.expert_masks, self.activation)
        output, _ = second(hidden)
        return output
