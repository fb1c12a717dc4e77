"""Static structured pruning: the same neurons and head dims are dropped for every token.

Common part of magnitude and Wanda pruning, which differ in the norms that scale the weights. Scores are those
of the structured baselines in FLAP (arXiv 2312.11983: "Mag-sp", "Wanda-sp"):

    neuron f     sum_i |W_down[i, f]| * n_f
    V/O dim a    sum over heads and i of |W_o[i, (head, a)]| * n_(head, a)
    Q/K unit u   sum over the unit's dims a of q_a k_a, where q_a = sum over heads and j of |W_q[(head, a), j]| * n_j
                 and k_a likewise: an attention logit is a sum of products q k

where n are the norms of the matrix's inputs (Wanda) or ones (magnitude).

Simplified: All layers have the same widths, as in those baselines. Head dims are dropped in all heads at once,
and RoPE pairs as one unit, because a ToMoE checkpoint cannot express more. Weights are not updated after
pruning, and biases are not scored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tomoe_training.budget import choose_units
from tomoe_training.evaluation.baselines.setup import BaselineSetup, MethodGates
from tomoe_training.evaluation.baselines.widths import uniform_widths
from tomoe_vllm.hf.configuration_tomoe import Family
from tomoe_vllm.hf.modeling_tomoe import ExpertGate, HeadGate
from tomoe_vllm.hf.tomoe_math import BlockShape, head_units, top_mask


class StaticHeadGate(HeadGate):
    """Keeps the same head dims for every token. Both masks: [A] bool."""

    def __init__(self, query_key_dims: Tensor, value_dims: Tensor):
        super().__init__()
        self.register_buffer("query_key_dims", query_key_dims)
        self.register_buffer("value_dims", value_dims)

    def query_key_mask(self) -> Tensor:
        return self.query_key_dims

    def value_mask(self, hidden_states: Tensor) -> Tensor:
        return self.value_dims


class StaticExpertGate(ExpertGate):
    """Keeps the same neurons for every token. ``neurons``: [F] bool."""

    def __init__(self, neurons: Tensor):
        super().__init__()
        self.register_buffer("neurons", neurons)

    def neuron_mask(self, hidden_states: Tensor) -> Tensor:
        return self.neurons


@dataclass(frozen=True, kw_only=True)
class InputNorms:
    """Norms of the inputs of one layer's matrices; ones mean scores by weights alone."""

    attention_in: Tensor  # [D], input of q_proj and k_proj
    attention_out: Tensor  # [H * A]
    mlp_out: Tensor  # [F]


@dataclass(frozen=True, kw_only=True)
class UnitScores:
    """Scores of one layer's units: neurons [F], Q/K units [U], V/O dims [A]."""

    neurons: Tensor
    query_key: Tensor
    value: Tensor


@torch.no_grad()
def unit_scores(layer: nn.Module, family: Family, shape: BlockShape, norms: InputNorms) -> UnitScores:
    """Scores of one decoder layer by the formulas above, float32."""

    def output_scores(path: str, input_norms: Tensor) -> Tensor:
        return layer.get_submodule(path).weight.float().abs().sum(dim=0) * input_norms

    def row_scores(path: str) -> Tensor:
        rows = layer.get_submodule(path).weight.float().abs() @ norms.attention_in
        return rows.view(-1, shape.head_dim).sum(dim=0)

    units = head_units(shape.head_dim, shape.rotary_dim).to(norms.attention_in.device)
    products = row_scores("self_attn.q_proj") * row_scores("self_attn.k_proj")
    return UnitScores(
        neurons=output_scores(family.mlp_out, norms.mlp_out),
        query_key=products.new_zeros(shape.num_units).index_add_(0, units, products),
        value=output_scores(family.attention_out, norms.attention_out).view(-1, shape.head_dim).sum(dim=0),
    )


def prune(setup: BaselineSetup, norms: list[InputNorms], *, attention_ratio: float, tokens: int) -> MethodGates:
    """Keep the best-scored units: ``attention_ratio`` of the head dims, and neurons for the rest of the budget.

    With ``attention_ratio`` 1 attention stays dense.
    """
    shape, layers = setup.shape, setup.layers
    widths = uniform_widths(shape, len(layers), setup.config.active_ratio, attention_ratio)
    heads: list[HeadGate] = []
    experts: list[ExpertGate] = []
    for i, layer in enumerate(layers):
        scores = unit_scores(layer, setup.family, shape, norms[i])
        experts.append(StaticExpertGate(top_mask(scores.neurons, widths.experts[i])))
        if attention_ratio < 1:
            units = choose_units(scores.query_key, widths.qk_dims[i], shape)
            dims = units[head_units(shape.head_dim, shape.rotary_dim).to(units.device)]
            heads.append(StaticHeadGate(dims, top_mask(scores.value, widths.vo_dims[i])))
    return MethodGates(heads=heads, experts=experts, widths=widths, tokens=tokens)
