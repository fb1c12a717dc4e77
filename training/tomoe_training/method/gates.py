"""Gates for training: masks from embeddings, with noise and straight-through gradients.

They are subclasses of the reference model's gates, attached at the same positions, and differ only in how they
compute the masks. Masks of experts and of Q/K are computed once per step and indexed per token. The logits depend
only on the expert, so this is T/N times cheaper than sampling per token and changes only how noise is shared.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomoe_training.budget import NUM_QUANTILES, Widths, choose_units, unit_sizes
from tomoe_training.config import MethodSettings
from tomoe_training.method.masking import mask_by_expert
from tomoe_training.method.relaxation import sample_mask, sample_route, straight_through, width_mask
from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.hf.modeling_tomoe import ExpertGate, HeadGate
from tomoe_vllm.hf.tomoe_math import head_units, value_logits


class LayerNoise(NamedTuple):
    """Noise of one layer, from :class:`~tomoe_training.method.relaxation.StepNoise`; None means no noise."""

    experts: Tensor | None = None
    query_key: Tensor | None = None
    router: Tensor | None = None
    value: Tensor | None = None


NOISE_FREE = LayerNoise()

QUANTILE_TOKENS = 64
"""Tokens per sequence for the quantiles of the value logits: 4,096 values at head_dim 64."""


def quantiles_per_sequence(logits: Tensor) -> Tensor:
    """Quantiles of [B, S, A] logits within each sequence, averaged over the batch: [NUM_QUANTILES].

    A mean of quantiles per sequence, so that the mean over two processes equals the result of one.
    """
    stride = max(1, logits.shape[1] // QUANTILE_TOKENS)
    values = logits[:, ::stride].flatten(1).sort(dim=-1).values
    points = torch.linspace(0, values.shape[1] - 1, NUM_QUANTILES, device=logits.device).long()
    return values[:, points].mean(dim=0)


class TrainedHeadGate(HeadGate):
    """Head-dim masks of one attention layer, from the expert embeddings of its module (eq. 5)."""

    def __init__(self, config, layer_idx: int, settings: MethodSettings):
        super().__init__()
        shape, router_dim, vo_mode = block_shape(config), settings.value_router_dim, settings.vo_mode
        self.shape, self.layer_idx, self.vo_mode, self.tau = shape, layer_idx, vo_mode, settings.tau
        self.register_buffer("units", head_units(shape.head_dim, shape.rotary_dim), persistent=False)
        self.register_buffer("unit_sizes", unit_sizes(shape, None), persistent=False)
        self.norm = nn.LayerNorm(router_dim)
        self.query_key_up = nn.Linear(router_dim, shape.num_units, bias=False)
        self.query_key_offset = nn.Parameter(torch.zeros(shape.num_units))
        self.embedding_offset = nn.Parameter(torch.zeros(router_dim))
        if vo_mode != "none":
            self.value_up = nn.Linear(router_dim, shape.head_dim, bias=False)
        if vo_mode == "dynamic":
            self.value_down = nn.Linear(shape.hidden_size, router_dim, bias=False)
        if vo_mode == "static":
            self.value_offset = nn.Parameter(torch.zeros(shape.head_dim))
        self.keeps_query_key, self.keeps_value = False, vo_mode == "none"

    def freeze_widths(self, widths: Widths) -> None:
        """Declare the widths constant: dims that are all kept need no mask from now on, and are not trained."""
        self.keeps_query_key = widths.qk_dims[self.layer_idx] == self.shape.head_dim
        self.keeps_value = self.vo_mode == "none" or widths.vo_dims[self.layer_idx] == self.shape.head_dim
        for name, parameter in self.named_parameters():
            is_idle = self.keeps_value if name.startswith("value_") else self.keeps_query_key
            if is_idle if name.startswith(("value_", "query_key_")) else self.keeps_query_key and self.keeps_value:
                parameter.requires_grad_(False)

    def mean_embedding(self, embedding: Tensor) -> Tensor:
        """Mean expert embedding [R] of this module: the value router's bias."""
        return embedding.mean(dim=0) + self.embedding_offset

    def static_logits(self, mean: Tensor) -> tuple[Tensor, Tensor | None]:
        """Q/K logits [U], and V/O logits [A] if ``vo_mode`` is static, from the mean embedding [R]."""
        hidden = F.gelu(self.norm(mean))
        query_key = self.query_key_up(hidden) + self.query_key_offset
        value = self.value_up(hidden) + self.value_offset if self.vo_mode == "static" else None
        return query_key, value

    def make_masks(self, embedding: Tensor, noise: LayerNoise, widths: Widths | None) -> None:
        """Compute the masks of a step from embeddings [N, R]; with ``widths``, of exactly these widths."""
        self._mean, self._noise, self._widths = self.mean_embedding(embedding), noise, widths
        self.qk_width = self.vo_width = self._mean.new_full((), float(len(self.units)))
        self._query_key_mask = self._static_value_mask = None
        if self.keeps_query_key and (self.keeps_value or self.vo_mode == "dynamic"):
            return
        query_key, value = self.static_logits(self._mean)
        if not self.keeps_query_key:
            self._make_query_key_mask(query_key, noise, widths)
        if value is not None and not self.keeps_value:
            if widths is None:
                self._static_value_mask = sample_mask(value, None, self.tau)
            else:
                self._static_value_mask = width_mask(value, widths.vo_dims[self.layer_idx], None, self.tau)
            self.vo_width = self._static_value_mask.sum()

    def _make_query_key_mask(self, query_key: Tensor, noise: LayerNoise, widths: Widths | None) -> None:
        if widths is None:
            units = sample_mask(query_key, noise.query_key, self.tau)
        else:
            units = self._exact_units(query_key, widths.qk_dims[self.layer_idx], noise.query_key)
        self.qk_width = (units * self.unit_sizes).sum()
        self._query_key_mask = units[self.units]

    def _exact_units(self, logits: Tensor, num_dims: int, noise: Tensor | None) -> Tensor:
        """Mask of units with exactly ``num_dims`` dims: a width mask if all units are pairs, else pairs and singles."""
        if self.shape.rotary_dim == self.shape.head_dim:
            return width_mask(logits, num_dims // 2, noise, self.tau)
        noisy = logits if noise is None else logits + noise
        kept = choose_units(noisy.detach(), num_dims, self.shape)
        threshold = noisy.detach().masked_fill(~kept, torch.inf).min()
        return straight_through(kept, torch.sigmoid((noisy - threshold) / self.tau))

    def query_key_mask(self) -> Tensor | None:
        return self._query_key_mask

    def value_mask(self, hidden_states: Tensor) -> Tensor | None:
        if self.keeps_value:
            return None
        if self.vo_mode == "static":
            return self._static_value_mask
        logits = value_logits(
            hidden_states, self.value_down.weight, self._mean, self.norm.weight, self.norm.bias, self.value_up.weight
        )
        self.batch_quantiles = quantiles_per_sequence(logits.detach())
        if self._widths is None:
            mask = sample_mask(logits, self._noise.value, self.tau)
        else:
            mask = width_mask(logits, self._widths.vo_dims[self.layer_idx], self._noise.value, self.tau)
        # The mean over tokens, as K is the mean. (The released code penalizes the maximum.)
        self.vo_width = mask.sum(dim=-1).mean()
        return mask


class TrainedExpertGate(ExpertGate):
    """Neuron masks of one MLP: a router, and N masks from the embeddings of the module (eq. 3)."""

    def __init__(self, config, layer_idx: int, settings: MethodSettings):
        super().__init__()
        shape, num_experts, router_dim = block_shape(config), settings.num_experts, settings.value_router_dim
        self.layer_idx, self.tau = layer_idx, settings.tau
        self.router = nn.Linear(shape.hidden_size, num_experts, bias=False)
        self.norm = nn.LayerNorm(router_dim)
        self.up = nn.Linear(router_dim, shape.intermediate_size, bias=False)
        self.offset = nn.Parameter(torch.zeros(num_experts, shape.intermediate_size))

    def logits(self, embedding: Tensor) -> Tensor:
        """Mask logits of every expert, [N, F], from embeddings [N, R]."""
        return self.up(F.gelu(self.norm(embedding))) + self.offset

    def make_masks(self, embedding: Tensor, noise: LayerNoise, widths: Widths | None) -> None:
        """Compute the expert masks of a step; with ``widths``, of exactly this width."""
        logits = self.logits(embedding)
        if widths is None:
            self.masks = sample_mask(logits, noise.experts, self.tau)
        else:
            self.masks = width_mask(logits, widths.experts[self.layer_idx], noise.experts, self.tau)
        # The exported masks have no noise: width and union are measured on masks without noise.
        if noise.experts is None:
            self.clean_masks = self.masks
        elif widths is None:
            self.clean_masks = sample_mask(logits, None, self.tau)
        else:
            self.clean_masks = width_mask(logits, widths.experts[self.layer_idx], None, self.tau)
        self._keeps_all = widths is not None and widths.experts[self.layer_idx] == logits.shape[-1]
        self._router_noise = noise.router

    def choose(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Expert and soft route of each token (:func:`sample_route`); also stores the terms of R_L."""
        logits = F.linear(hidden_states.float(), self.router.weight)
        experts, soft = sample_route(logits, self._router_noise, self.tau)
        clean = soft if self._router_noise is None else torch.softmax(logits / self.tau, dim=-1)
        is_chosen = experts.flatten().unsqueeze(-1) == torch.arange(logits.shape[-1], device=experts.device)
        self.fractions = is_chosen.sum(dim=0) / experts.numel()  # bincount would wait for the device
        self.probabilities = clean.flatten(0, -2).mean(dim=0)
        return experts, soft

    def neuron_mask(self, hidden_states: Tensor) -> Tensor:
        """Mask by definition: route times masks. A training step computes the same with :func:`mask_by_expert`."""
        experts, soft = self.choose(hidden_states)
        return straight_through(F.one_hot(experts, soft.shape[-1]), soft) @ self.masks

    def _read(self, module, args):
        if self.is_on:
            self._experts, self._soft_routes = self.choose(args[0])

    def _mask_neurons(self, module, args):
        if self.is_on and not self._keeps_all:
            return (mask_by_expert(args[0], self._soft_routes, self.masks, self._experts), *args[1:])
