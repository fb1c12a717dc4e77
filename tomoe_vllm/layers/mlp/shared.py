"""The ``shared`` layout: one copy of the weights, one row per neuron. A token reads the rows of its expert only.

The checkpoint's tensors are copied into this layout while they are read (W_down transposed), so there is no second copy
of the weights. Quantization and LoRA do not apply: both work on vLLM's linears only.
"""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.platforms import current_platform

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.kernels.expert_mlp import ExpertWeights, expert_mlp
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import LayerShape, load_thresholds, warm_up
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_order
from tomoe_vllm.layers.mlp.neuron_rows import NeuronRows
from tomoe_vllm.layers.mlp.router import ToMoERouter


class ToMoESharedMLP(nn.Module):
    """MLP of one layer. Its modules have the names of the masked layout: gate_up_proj and down_proj, or fc1 and fc2.

    Raises ``ValueError`` for an unsupported activation, or a tensor parallel size that does not divide the neurons.
    """

    why_not_reloadable: str | None = None

    def __init__(self, config: PreTrainedConfig, layer_idx: int, *, has_bias: bool, prefix: str) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.has_bias = has_bias
        self.is_gated = block_shape(config).num_mlp_matrices == 3
        self.tp_size = get_tensor_model_parallel_world_size()
        self.max_tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
        self.expert_gate = ToMoERouter(config, layer_idx, f"{prefix}.expert_gate")
        sizes = config.hidden_size, config.intermediate_size
        first, second = ("gate_up_proj", "down_proj") if self.is_gated else ("fc1", "fc2")
        self.add_module(first, NeuronRows(*sizes, num_parts=1 + self.is_gated, has_bias=has_bias))
        self.add_module(second, NeuronRows(*sizes, has_bias=has_bias, is_transposed=True))
        self.weights = self._weights()

    def step_path(self, num_tokens: int) -> str:
        """Execution path of a step of ``num_tokens``, as metrics name it: ``shared_`` and the op's path."""
        if self.expert_gate.widths.device.type != "cuda":
            return "shared_rows"
        return f"shared_{load_thresholds(LayerShape.of(self.weights)).path(num_tokens)}"

    @property
    def projections(self) -> tuple[NeuronRows, NeuronRows]:
        """W_gate and W_up (or W_up alone), and W_down."""
        return (self.gate_up_proj, self.down_proj) if self.is_gated else (self.fc1, self.fc2)

    def _weights(self) -> ExpertWeights:
        """Arguments of the op. Must be rebuilt whenever one of its tensors is replaced."""
        (up, down), router = self.projections, self.expert_gate
        # .data: these tensors keep the weights' memory alive even if the parameters are replaced.
        up_bias = None if up.bias is None else up.bias.data
        lists = router.expert_masks, router.neuron_ids, router.widths
        return ExpertWeights(up.weight.data, up_bias, down.weight.data, *lists, self.activation)

    def finish_loading(self) -> None:
        """Set the masks and prepare for the first step, after loading.

        On a CPU: permute the neurons so that each expert's rows form few runs, which are read faster. Not on a GPU:
        experts share tiles in L2 in any order there, and no order was measured. On a GPU: compile the kernels.
        """
        masks = self.expert_gate.masks()
        if current_platform.is_cpu():
            order = neuron_order(masks)
            masks = masks[:, order]
            for rows in self.projections:
                rows.set_order(order)
        self.expert_gate.set_masks(masks)
        self.weights = self._weights()  # the C++ kernels copy the lists
        if self.weights.up.is_cuda:
            warm_up(self.weights, self.max_tokens)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """MLP of T tokens: [T, D] -> [T, D]."""
        output = expert_mlp(hidden_states, self.expert_gate(hidden_states), self.weights)
        if self.tp_size > 1:
            output = tensor_model_parallel_all_reduce(output)
        return output + self.projections[1].bias if self.has_bias else output
