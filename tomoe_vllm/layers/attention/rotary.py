"""Rotary embedding of heads that lost some of their dims.

RoPE turns dims in pairs (i, i + rotary_dim / 2), each with a frequency of its own, and a pair is kept or dropped as
one. So a head of the kept dims alone, first halves of the pairs before second halves, is rotated by vLLM's own kernel
once it is given the columns of the kept pairs. Dims past ``rotary_dim`` (partial rotary, Phi) are paired among
themselves at angle 0, which changes no bit; so the rotated width depends on the config only, and not on which
dims were kept (it is a constant of compiled graphs).
"""

import torch
from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def rotation_order(kept: Tensor, rotary_dim: int) -> Tensor:
    """Kept dims of a head in the order in which the pruned head holds them.

    ``kept``: [A], non-zero where a dim is kept, whole pairs. Returns [C] int64: position j < C // 2 is rotated with
    j + C // 2, and the last one of an odd C with none.
    """
    pairs = kept[: rotary_dim // 2].nonzero().flatten()
    singles = kept[rotary_dim:].nonzero().flatten() + rotary_dim
    half = len(singles) // 2
    return torch.cat([pairs, singles[:half], pairs + rotary_dim // 2, singles[half:]])


def is_plain_rotary(rotary: RotaryEmbedding) -> bool:
    """Whether the embedding is a look-up in its ``cos_sin_cache`` (llama3, yarn and linear scaling are)."""
    return type(rotary).forward_native is RotaryEmbedding.forward_native and hasattr(rotary, "cos_sin_cache")


class SelectedRotaryEmbedding(RotaryEmbedding):
    """``base`` for heads of ``width`` kept dims; :meth:`select` says which, once they are known."""

    def __init__(self, base: RotaryEmbedding, width: int) -> None:
        super().__init__(
            head_size=width,
            rotary_dim=width // 2 * 2,
            max_position_embeddings=base.max_position_embeddings,
            base=base.base,
            is_neox_style=base.is_neox_style,
            dtype=base.dtype,
            init_cache=False,
        )
        self._cache_of_all_pairs, self._all_pairs = base.cos_sin_cache, base.rotary_dim // 2
        self.register_buffer("cos_sin_cache", torch.empty(0), persistent=False)

    def forward_cpu(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """In 16-bit types in plain torch: vLLM's CPU kernel stores eight values at an address it takes for aligned,
        which pruned heads are not, and the process dies."""
        is_aligned = query.element_size() >= 4
        forward = super().forward_cpu if is_aligned else self.forward_native
        return forward(positions, query, key)

    def select(self, order: Tensor) -> None:
        """Take the frequencies of ``order`` [C] (:func:`rotation_order`): [positions, 2 * (C // 2)]."""
        cos, sin = self._cache_of_all_pairs.chunk(2, dim=-1)
        firsts = order[: self.rotary_dim // 2]
        pairs = firsts[firsts < self._all_pairs]
        shape = len(cos), len(firsts) - len(pairs)
        still = cos.new_ones(shape), cos.new_zeros(shape)
        self.cos_sin_cache = torch.cat([cos[:, pairs], still[0], sin[:, pairs], still[1]], dim=-1)
