"""The MLP of ToMoE in its exact masked form: the dense GEMMs, and the routed expert's mask between them.

Nothing is rewritten or copied per expert: gate_up and down are vLLM's own linears, so tensor parallelism,
quantization and LoRA work as for the dense model. What it gives up: no FLOP is saved here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.hf.tomoe_math import route, unpack_signature
from tomoe_vllm.kernels.expert_activation import expert_activation, require_activation


class ToMoEExpertGate(nn.Module):
    """Routes tokens and holds the expert masks. The router is replicated, the neurons are sharded like gate_up.

    ``signature``: [F / tp, ceil(N / 8)] uint8, the checkpoint's bits; ``expert_masks``: [N, F / tp] in the
    model's dtype, the same bits as the activation step reads them. Until a checkpoint is loaded every expert
    keeps every neuron (vLLM's ``--load-format dummy`` leaves integers alone).
    """

    expert_masks: Tensor

    def __init__(self, config: PreTrainedConfig, layer_idx: int, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.num_experts = config.num_experts
        self.num_neurons = config.intermediate_size
        self.width = config.expert_intermediate_sizes[layer_idx]
        tp_size = get_tensor_model_parallel_world_size()
        if self.num_neurons % tp_size:
            raise ValueError(
                f"tensor parallel size {tp_size} does not divide intermediate_size {self.num_neurons}; "
                "choose one that does"
            )
        num_local = self.num_neurons // tp_size
        self.router = nn.Linear(config.hidden_size, self.num_experts, bias=False, dtype=torch.float32)
        signature = torch.full((num_local, -(-self.num_experts // 8)), 0xFF, dtype=torch.uint8)
        self.signature = nn.Parameter(signature, requires_grad=False)
        set_weight_attrs(self.signature, {"weight_loader": self._load_signature})
        self.register_buffer("expert_masks", torch.ones(self.num_experts, num_local), persistent=False)

    def _load_signature(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        shape = (self.num_neurons, parameter.shape[1])
        if loaded.shape != shape or loaded.dtype != torch.uint8:
            raise ValueError(
                f"{self.prefix}.signature is {loaded.dtype} {list(loaded.shape)}; it must be uint8 {list(shape)}"
            )
        masks = unpack_signature(loaded, self.num_experts)
        widths = masks.sum(dim=1).tolist()
        if any(width != self.width for width in widths):
            raise ValueError(
                f"{self.prefix}.signature gives experts of {widths} neurons; config.json says {self.width}. "
                "Export the checkpoint again"
            )
        num_local = parameter.shape[0]
        start = get_tensor_model_parallel_rank() * num_local
        parameter.data.copy_(loaded.narrow(0, start, num_local))
        self.expert_masks.copy_(masks.narrow(1, start, num_local))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Expert of each token: [T, D] -> [T] int64."""
        return route(F.linear(hidden_states.float(), self.router.weight))


class ToMoEMLP(nn.Module):
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
