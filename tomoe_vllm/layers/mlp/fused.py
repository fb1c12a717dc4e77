"""The MLP of ToMoE on vLLM's own fused MoE: each expert a dense matrix of its own.

For serving that is nearly all prefill, with memory to spare: N p times that of the dense MLP (four times at N = 8 and
p = 0.5), and below some hundred tokens a step it reads more than the dense model does (docs/performance.md). The
softmax of the router is renormalized over the one expert taken, so its weight is exactly 1.

The checkpoint's rows are held in host memory until all of it is read, since the signatures may come last; then each
layer's experts are sliced out of its rows, which are freed before the next layer's turn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.layers.mlp.neuron_rows import NeuronRows
from tomoe_vllm.layers.mlp.router import ToMoEExpertGate

CPU_MULTIPLE = 32
"""Widths that vLLM's CPU kernel takes; it also asks it of hidden_size."""
GPU_MULTIPLE = 128
"""Widths that every GPU kernel of vLLM's fused MoE takes."""


def obstacle_to_experts(config: PreTrainedConfig) -> str | None:
    """Why vLLM's fused MoE cannot run this model's MLP, or None."""
    if block_shape(config).num_mlp_matrices != 3:
        return "vLLM's fused MoE needs an MLP with a gate"
    if config.hidden_act != "silu":
        return f"only silu was tried in vLLM's fused MoE and hidden_act is {config.hidden_act!r}"
    if current_platform.is_cpu() and config.hidden_size % CPU_MULTIPLE:
        return f"vLLM's CPU kernel needs a hidden_size divisible by {CPU_MULTIPLE}; it is {config.hidden_size}"
    return None


def rank_width(width: int) -> int:
    """Neurons of an expert of ``width`` that one tensor-parallel rank holds, with padding."""
    multiple = CPU_MULTIPLE if current_platform.is_cpu() else GPU_MULTIPLE
    share = -(-width // get_tensor_model_parallel_world_size())
    return -(-share // multiple) * multiple


def fused_parameters(config: PreTrainedConfig) -> int:
    """Parameters of all experts of all layers that one rank holds, with padding."""
    widths = sum(rank_width(width) for width in config.expert_intermediate_sizes)
    return 3 * config.hidden_size * config.num_experts * widths


class ToMoEFusedMLP(nn.Module):
    """``gate_up_proj`` and ``down_proj`` are the checkpoint's until it is loaded, ``experts`` runs."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int, *, has_bias: bool, prefix: str) -> None:
        super().__init__()
        # Experts are shared out by their lists, evenly, so every rank reads all neurons.
        self.expert_gate = ToMoEExpertGate(config, layer_idx, f"{prefix}.expert_gate", is_sharded=False)
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
        routed = self.experts.routed_experts
        routed.quant_method = SlicedExpertsMethod(routed, self)

    def step_path(self, num_tokens: int) -> str:
        """The way a step of ``num_tokens`` takes through the weights: vLLM's fused MoE."""
        return "fused"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        router_logits = F.linear(hidden_states.float(), self.expert_gate.router.weight)
        self.expert_gate.keep(router_logits)
        output = self.experts(hidden_states, router_logits)
        bias = self.down_proj.bias
        return output if bias is None else output + bias


class SlicedExpertsMethod(UnquantizedFusedMoEMethod):
    """What vLLM calls to finish and to run the experts: they come about here, out of an MLP's dense rows."""

    supports_pre_processed_weights = False

    def __init__(self, routed: nn.Module, mlp: ToMoEFusedMLP) -> None:
        super().__init__(routed.moe_config)
        self.supports_pre_processed_weights = False
        self.sources = (mlp.expert_gate, mlp.gate_up_proj, mlp.down_proj)  # a tuple: not submodules of this one
        # vLLM made room already, padded as its kernel wants it. It is given back until there is something to hold.
        self.shapes = {name: parameter.shape for name, parameter in routed.named_parameters()}
        self.device, self.dtype = routed.w13_weight.device, routed.w13_weight.dtype
        for name in self.shapes:
            delattr(routed, name)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Slice the experts, free the rows, then do what vLLM does with any experts."""
        gate, up, down = self.sources
        new = {name: torch.zeros(shape, dtype=self.dtype, device=self.device) for name, shape in self.shapes.items()}
        padded, num_neurons, hidden_size = new["w2_weight"].shape[2], up.num_neurons, down.weight.shape[1]
        for expert, neurons in enumerate(_neurons_of_this_rank(gate)):
            num = len(neurons)
            for part in range(2):  # gate, up
                place, source = part * padded, neurons + part * num_neurons
                new["w13_weight"][expert, place : place + num, :hidden_size] = up.weight[source]
                if up.bias is not None:
                    new["w13_bias"][expert, place : place + num] = up.bias[source]
            new["w2_weight"][expert, :hidden_size, :num] = down.weight[neurons].T
        for name, tensor in new.items():
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for rows in (up, down):
            rows.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        if down.bias is not None:
            down.bias.data = down.bias.data.to(self.device)
        super().process_weights_after_loading(layer)


def _neurons_of_this_rank(gate: ToMoEExpertGate) -> list[Tensor]:
    """Each expert's neurons, shared out evenly between the ranks."""
    rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    ids, widths = gate.neuron_ids.cpu().long(), gate.widths.tolist()
    return [row[:width].tensor_split(num_ranks)[rank] for row, width in zip(ids, widths, strict=True)]
