"""The ``fused`` layout: vLLM's fused MoE, with a dense matrix for each expert.

It suits workloads of mostly prefill with memory to spare. Its experts take N p times the memory of the dense MLP (four
times at N = 8 and p = 0.5), and in steps of less than a few hundred tokens it reads more than the dense model
(docs/performance.md). The router's softmax is renormalized over the one selected expert, whose weight is therefore
exactly 1.

The checkpoint's rows stay in host memory until the whole checkpoint is read, because the signatures may come last. Then
each layer's experts are sliced out of its rows, and the rows are freed before the next layer is processed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.platforms import current_platform

from tomoe_vllm.compat.layers import FusedMoEFactory, UnquantizedFusedMoEMethod, replace_quant_method, routed_experts
from tomoe_vllm.layers.mlp.neuron_rows import NeuronRows
from tomoe_vllm.layers.mlp.router import ToMoERouter

CPU_MULTIPLE = 32
"""vLLM's CPU kernel needs expert widths and a hidden_size that are multiples of this."""
GPU_MULTIPLE = 128
"""Every GPU kernel of vLLM's fused MoE supports expert widths that are multiples of this."""


def rank_width(width: int) -> int:
    """Neurons of an expert of ``width`` neurons that are stored on one tensor-parallel rank, with padding."""
    multiple = CPU_MULTIPLE if current_platform.is_cpu() else GPU_MULTIPLE
    share = -(-width // get_tensor_model_parallel_world_size())
    return -(-share // multiple) * multiple


def fused_parameters(config: PreTrainedConfig) -> int:
    """Parameters of all experts of all layers on one rank, with padding."""
    widths = sum(rank_width(width) for width in config.expert_intermediate_sizes)
    return 3 * config.hidden_size * config.num_experts * widths


class ToMoEFusedMLP(nn.Module):
    """``gate_up_proj`` and ``down_proj`` hold the checkpoint's rows while it is loaded; ``experts`` computes."""

    why_not_reloadable: str | None = (
        "the fused layout cannot reload weights, since its experts are other tensors than the checkpoint's; "
        'start the engine with --hf-overrides \'{"expert_layout": "masked"}\', or restart it on the new checkpoint'
    )

    def __init__(self, config: PreTrainedConfig, layer_idx: int, *, has_bias: bool, prefix: str) -> None:
        super().__init__()
        # Each expert's neurons are divided evenly between the ranks, so every rank needs all rows and signatures.
        self.expert_gate = ToMoERouter(config, layer_idx, f"{prefix}.expert_gate", is_sharded=False)
        sizes = config.hidden_size, config.intermediate_size
        self.gate_up_proj = NeuronRows(*sizes, num_parts=2, has_bias=has_bias, is_staged=True)
        self.down_proj = NeuronRows(*sizes, has_bias=has_bias, is_transposed=True, is_staged=True)
        width = rank_width(config.expert_intermediate_sizes[layer_idx])
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=1,
            hidden_size=config.hidden_size,
            intermediate_size=width * get_tensor_model_parallel_world_size(),
            renormalize=True,
            activation=config.hidden_act,
            has_bias=has_bias,
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )
        routed = routed_experts(self.experts)
        replace_quant_method(routed, SlicedExpertsMethod(routed, self))

    def step_path(self, num_tokens: int) -> str:
        """Execution path of a step of ``num_tokens``, as metrics name it."""
        return "fused"

    def finish_loading(self) -> None:
        """Set the masks after loading. Only statistics read them: the experts are sliced by then."""
        self.expert_gate.set_masks(self.expert_gate.masks())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """MLP of T tokens: [T, D] -> [T, D]."""
        router_logits = F.linear(hidden_states.float(), self.expert_gate.router.weight)
        self.expert_gate.record_experts(router_logits)
        output = self.experts(hidden_states, router_logits)
        bias = self.down_proj.bias
        return output if bias is None else output + bias


class SlicedExpertsMethod(UnquantizedFusedMoEMethod):
    """vLLM's unquantized MoE method, which builds the expert weights by slicing the dense MLP's rows after loading."""

    supports_pre_processed_weights = False

    def __init__(self, routed: nn.Module, mlp: ToMoEFusedMLP) -> None:
        super().__init__(routed.moe_config)
        self.supports_pre_processed_weights = False
        self.sources = (mlp.expert_gate, mlp.gate_up_proj, mlp.down_proj)  # a tuple: not submodules of this one
        # vLLM has allocated the padded weights already. They are freed here and allocated again once there are rows.
        self.shapes = {name: parameter.shape for name, parameter in routed.named_parameters()}
        self.device, self.dtype = routed.w13_weight.device, routed.w13_weight.dtype
        for name in self.shapes:
            delattr(routed, name)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Slice the experts, free the rows, then process the experts as vLLM does with any unquantized ones."""
        router, up, down = self.sources
        new = {name: torch.zeros(shape, dtype=self.dtype, device=self.device) for name, shape in self.shapes.items()}
        padded, num_neurons, hidden_size = new["w2_weight"].shape[2], up.num_neurons, down.weight.shape[1]
        for expert, neurons in enumerate(_neurons_of_this_rank(router)):
            num = len(neurons)
            for part in range(2):  # gate, up
                start, source = part * padded, neurons + part * num_neurons
                new["w13_weight"][expert, start : start + num, :hidden_size] = up.weight[source]
                if up.bias is not None:
                    new["w13_bias"][expert, start : start + num] = up.bias[source]
            new["w2_weight"][expert, :hidden_size, :num] = down.weight[neurons].T
        for name, tensor in new.items():
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for rows in (up, down):
            rows.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        if down.bias is not None:
            down.bias.data = down.bias.data.to(self.device)
        super().process_weights_after_loading(layer)


def _neurons_of_this_rank(router: ToMoERouter) -> list[Tensor]:
    """Row indices of each expert's neurons on this rank; ranks have equal shares of every expert."""
    rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return [mask.nonzero().flatten().tensor_split(num_ranks)[rank] for mask in router.masks().cpu()]
