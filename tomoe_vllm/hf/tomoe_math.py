"""The equations of ToMoE at inference: routing, masks, packing and parameter counts.

Pure functions on tensors. Training, the Hugging Face reference model, the vLLM layers, the references of the
kernels and the exporter all call them.

Shape letters, used in the whole project:

    T tokens (any leading dims)   D hidden_size          F intermediate_size (neurons)
    N experts                     A head_dim             H attention heads, G key/value heads
    U units of a head that Q/K pruning keeps or drops: RoPE pairs and single dims
    R width of the value router's bottleneck (d_e in the paper, 128)

Equation numbers are those of ToMoE, arXiv 2501.15316v2.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_BIAS = 3.0
"""b of eq. 15: every mask starts almost completely open."""

GUMBEL_MEDIAN = -math.log(math.log(2.0))
"""Median of Gumbel(0, 1), 0.3665: with noise g, P(logit + b + g > 0) > 1/2 iff logit + b + median > 0."""


# ---------------------------------------------------------------------------------- masks, eq. 15
def keep_margin(logits: Tensor) -> Tensor:
    """Distance of mask logits from the decision boundary: positive where the keep-probability > 1/2.

    Eq. 15 without its noise: ``logits + b + median(Gumbel)``. Any shape, any float dtype.
    """
    return logits + (KEEP_BIAS + GUMBEL_MEDIAN)


def top_mask(logits: Tensor, width: int) -> Tensor:
    """Boolean mask of the ``width`` largest logits of the last dimension: exactly ``width`` ones, also with ties.

    Searches the smaller side: if most logits are kept, it finds the smallest ones.
    """
    size = logits.shape[-1]
    keeps_most = 2 * width > size
    few = logits.topk(size - width if keeps_most else width, dim=-1, largest=not keeps_most, sorted=False).indices
    return torch.full_like(logits, keeps_most, dtype=torch.bool).scatter_(-1, few, not keeps_most)


# --------------------------------------------------------------------------- MLP experts, eq. 3, 13
def route(router_logits: Tensor) -> Tensor:
    """Expert of each token: the argmax, without noise. Its gate value is 1. [T, N] -> [T] int64."""
    return router_logits.argmax(dim=-1)


def pack_signature(expert_masks: Tensor) -> Tensor:
    """Membership bits of every neuron: bit i of neuron f is set if expert i keeps f.

    ``expert_masks``: [N, F] bool. Returns [F, ceil(N / 8)] uint8, expert 0 in the lowest bit of byte 0.
    """
    num_experts, num_neurons = expert_masks.shape
    num_bytes = -(-num_experts // 8)
    padded = expert_masks.new_zeros((num_bytes * 8, num_neurons), dtype=torch.int32)
    padded[:num_experts] = expert_masks
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=expert_masks.device)
    packed = (padded.view(num_bytes, 8, num_neurons) * weights[None, :, None]).sum(dim=1)
    return packed.T.contiguous().to(torch.uint8)


def unpack_signature(signature: Tensor, num_experts: int) -> Tensor:
    """Inverse of :func:`pack_signature`: [F, ceil(N / 8)] uint8 -> [N, F] bool."""
    experts = torch.arange(num_experts, device=signature.device)
    return ((signature[:, experts // 8] >> (experts % 8)) & 1).bool().T.contiguous()


# ------------------------------------------------------------------------- attention dims, eq. 4, 5
def head_units(head_dim: int, rotary_dim: int) -> Tensor:
    """Unit of each head dim: dims of one RoPE pair (i, i + rotary_dim / 2) share a unit (appendix A.2).

    Dims beyond ``rotary_dim`` are not rotated (partial rotary); each of them is a unit.
    Returns [A] int64 with values in [0, U), U = head_dim - rotary_dim / 2.
    """
    pairs = torch.arange(rotary_dim // 2)
    return torch.cat([pairs, pairs, torch.arange(rotary_dim // 2, head_dim - rotary_dim // 2)])


def value_logits(
    hidden_states: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    up_weight: Tensor,
) -> Tensor:
    """Value/output mask logits of each token (eq. 5), in float32.

    ``Proj_D(GELU(LayerNorm(Proj_E(x) + mean embedding)))``. ``hidden_states``: [T, D], the input of q_proj,
    k_proj and v_proj; ``down_weight``: [R, D]; ``down_bias``: [R], the mean expert embedding;
    ``up_weight``: [A, R]. Returns [T, A].
    """
    embedding = F.linear(hidden_states.float(), down_weight.float(), down_bias.float())
    embedding = F.layer_norm(embedding, embedding.shape[-1:], norm_weight.float(), norm_bias.float())
    # Explicit GELU: for one token inside vLLM, F.gelu takes 40 to 90 us on CPUs with AVX-512, this takes 12 us.
    embedding = 0.5 * embedding * (1 + torch.erf(embedding * math.sqrt(0.5)))
    return F.linear(embedding, up_weight.float())


def mask_heads(heads: Tensor, mask: Tensor) -> Tensor:
    """Multiply the same [.., A] mask into every head of a flat [.., H * A] (or split [.., H, A]) tensor.

    ``mask``: [A], or one row per token [T, A]. The number of heads comes from ``heads``, so that Q with H heads
    and K with G heads are treated alike.
    """
    head_dim = mask.shape[-1]
    if heads.shape[-1] == head_dim and heads.dim() > mask.dim():
        return heads * (mask.unsqueeze(-2) if mask.dim() > 1 else mask)
    split = heads.unflatten(-1, (-1, head_dim))
    return (split * (mask.unsqueeze(-2) if mask.dim() > 1 else mask)).flatten(-2)


# ---------------------------------------------------------------------------------- the budget, eq. 8
@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes of one decoder block, and its parameter counts.

    Embeddings, lm_head, norms and biases do not count in the paper's budget. Routers are counted separately.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    num_mlp_matrices: int  # 3 with a gate (SwiGLU), 2 without

    @property
    def num_units(self) -> int:
        """Units U of a head: RoPE pairs and single dims."""
        return self.head_dim - self.rotary_dim // 2

    def active_parameters(self, qk_dims: float, vo_dims: float, mlp_width: float):
        """T(d) of eq. 8 for one block: parameters that one token uses. Also accepts tensors (gradient of R_P)."""
        heads = self.hidden_size * (self.num_heads + self.num_kv_heads)
        return heads * (qk_dims + vo_dims) + self.num_mlp_matrices * self.hidden_size * mlp_width

    @property
    def total_parameters(self) -> int:
        """T_total of eq. 8 for one block."""
        return int(self.active_parameters(self.head_dim, self.head_dim, self.intermediate_size))

    def router_parameters(self, num_experts: int, router_dim: int, vo_mode: str = "dynamic") -> int:
        """Parameters at inference in addition to the dense ones (appendix A.1): expert router and value router.

        As in the paper: Proj_E and Proj_D of the value router, and the expert router. LayerNorm and bias
        (3 R per layer) are not counted.
        """
        value = self.hidden_size * router_dim + router_dim * self.head_dim if vo_mode == "dynamic" else 0
        return value + self.hidden_size * num_experts
