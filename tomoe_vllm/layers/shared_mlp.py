"""The MLP of ToMoE on weights of our own: one row per neuron, of which a token reads its expert's.

The checkpoint's tensors are copied row by row into place, W_down transposed, as they are read: no second copy. What
it gives up: quantization and LoRA, which know vLLM's linears only.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.kernels.expert_activation import require_activation
from tomoe_vllm.kernels.expert_mlp import expert_mlp, row_padding
from tomoe_vllm.kernels.expert_mlp.thresholds import load_thresholds
from tomoe_vllm.kernels.native import prefer_huge_pages
from tomoe_vllm.layers.expert_gate import ToMoEExpertGate


class NeuronRows(nn.Module):
    """This rank's neurons of a projection, as rows.

    ``weight``: [parts * F / tp, D]; part 0 is the gate, part 1 up, where both are one module. ``bias``: one value per
    row, or, of a transposed projection (W_down), per output: [D], held by every rank.
    """

    def __init__(
        self, hidden_size: int, num_neurons: int, *, num_parts: int = 1, has_bias: bool, is_transposed: bool = False
    ) -> None:
        super().__init__()
        self.num_neurons = num_neurons
        self.num_local = num_neurons // get_tensor_model_parallel_world_size()
        self.start = get_tensor_model_parallel_rank() * self.num_local
        self.is_transposed = is_transposed
        num_rows = num_parts * self.num_local
        padding = row_padding(hidden_size) if is_transposed and current_platform.is_cpu() else 0
        rows = prefer_huge_pages(torch.empty(num_rows, hidden_size + padding))[:, :hidden_size]
        self.weight = nn.Parameter(rows, requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self._load_weight})
        self.bias: nn.Parameter | None = None
        if has_bias:
            self.bias = nn.Parameter(torch.empty(hidden_size if is_transposed else num_rows), requires_grad=False)
            set_weight_attrs(self.bias, {"weight_loader": self._load_bias})

    def _load_weight(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        self._place(parameter, loaded.T if self.is_transposed else loaded, getattr(loaded, "shard_id", 0))

    def _load_bias(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        if self.is_transposed:
            default_weight_loader(parameter, loaded)
        else:
            self._place(parameter, loaded, getattr(loaded, "shard_id", 0))

    def _place(self, parameter: nn.Parameter, rows: Tensor, part: int) -> None:
        """Copy this rank's neurons into part ``part`` (vLLM's mapper sets it: 0 the gate, 1 up)."""
        expected = [self.num_neurons, *parameter.shape[1:]]
        if list(rows.shape) != expected:
            raise ValueError(
                f"a tensor of the MLP has {list(rows.shape)} (neurons first); config.json says {expected}. "
                "Export the checkpoint again"
            )
        target = parameter.data.narrow(0, part * self.num_local, self.num_local)
        target.copy_(rows.narrow(0, self.start, self.num_local))


class ToMoESharedMLP(nn.Module):
    """The modules are named as in the masked layout (``gate_up_proj`` and ``down_proj``, or ``fc1`` and ``fc2``).

    Raises ``ValueError`` for an unsupported activation or a tensor parallel size that does not divide the neurons.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, *, has_bias: bool, prefix: str) -> None:
        super().__init__()
        require_activation(config.hidden_act)
        self.activation = config.hidden_act
        self.is_gated = block_shape(config).num_mlp_matrices == 3
        self.tp_size = get_tensor_model_parallel_world_size()
        self.thresholds = load_thresholds()
        self.expert_gate = ToMoEExpertGate(config, layer_idx, f"{prefix}.expert_gate")
        sizes = config.hidden_size, config.intermediate_size
        first, second = ("gate_up_proj", "down_proj") if self.is_gated else ("fc1", "fc2")
        self.add_module(first, NeuronRows(*sizes, num_parts=1 + self.is_gated, has_bias=has_bias))
        self.add_module(second, NeuronRows(*sizes, has_bias=has_bias, is_transposed=True))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        up, down = (self.gate_up_proj, self.down_proj) if self.is_gated else (self.fc1, self.fc2)
        gate = self.expert_gate
        output = expert_mlp(
            hidden_states,
            gate(hidden_states),
            up.weight,
            up.bias,
            down.weight,
            gate.expert_masks,
            gate.neuron_ids,
            gate.widths,
            self.activation,
            self.thresholds,
        )
        if self.tp_size > 1:
            output = tensor_model_parallel_all_reduce(output)
        return output if down.bias is None else output + down.bias
