"""Removes pruned dims from an attention layer: rows and columns of its linears, and columns of its rotary table.

RoPE rotates the dims of a head in pairs (i, i + rotary_dim / 2), each pair at its own frequency, and a pair is kept or
dropped as a whole. A head that stores the first dims of its kept pairs before the second ones is therefore rotated by
vLLM's own kernel, once ``cos_sin_cache`` holds the columns of the kept pairs only. Dims past ``rotary_dim`` (partial
rotary, Phi) are paired with each other at angle 0, which changes no bit. The rotated width then depends on the config
alone and not on the choice of kept dims: compiled graphs contain it as a constant.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tomoe_vllm.compat.layers import RotaryEmbedding, UnquantizedLinearMethod


class PrunedLinearMethod(UnquantizedLinearMethod):
    """Linear method that removes rows (or columns) of the weight after loading.

    vLLM's linear loads and shards the checkpoint's tensor as usual. The kept part replaces it layer by layer, before
    vLLM packs the weight for oneDNN on CPUs, so at most one layer's weight exists twice.

    ``kept()``: int64 indices of the rows of this rank that stay; of the columns with ``is_column=True``.
    """

    supports_pre_processed_weights = False

    def __init__(self, kept: Callable[[], Tensor], *, is_column: bool = False) -> None:
        super().__init__()
        self.kept, self.dim = kept, int(is_column)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Remove what is not kept, then process the rest as vLLM does with any unquantized weight."""
        kept = self.kept()
        layer.weight = nn.Parameter(layer.weight.data.index_select(self.dim, kept), requires_grad=False)
        if self.dim == 0 and layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.data[kept], requires_grad=False)
        super().process_weights_after_loading(layer)


def rotation_order(kept: Tensor, rotary_dim: int) -> Tensor:
    """Kept dims of a head, in the order in which the pruned head stores them.

    ``kept``: [A], non-zero where a dim is kept; RoPE pairs whole. Returns [C] int64: position j < C // 2 is rotated
    with j + C // 2; the last position of an odd C is not rotated.
    """
    pairs = kept[: rotary_dim // 2].nonzero().flatten()
    singles = kept[rotary_dim:].nonzero().flatten() + rotary_dim
    half = len(singles) // 2
    return torch.cat([pairs, singles[:half], pairs + rotary_dim // 2, singles[half:]])


def is_plain_rotary(rotary: RotaryEmbedding) -> bool:
    """Whether the embedding only looks up its ``cos_sin_cache`` (true of llama3, yarn and linear scaling)."""
    return type(rotary).forward_native is RotaryEmbedding.forward_native and hasattr(rotary, "cos_sin_cache")


class SelectedRotaryEmbedding(RotaryEmbedding):
    """``base`` for heads of ``width`` kept dims. :meth:`select` sets which dims, once the checkpoint is loaded."""

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
        self._cache_of_all_pairs, self._num_pairs = base.cos_sin_cache, base.rotary_dim // 2
        self.register_buffer("cos_sin_cache", torch.empty(0), persistent=False)

    def forward_cpu(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rotate queries and keys; plain torch in 16-bit dtypes.

        vLLM's CPU kernel stores eight 16-bit values at an address that it assumes to be aligned. Pruned heads are not
        aligned, and the process dies with a segmentation fault.
        """
        is_aligned = query.element_size() >= 4
        forward = super().forward_cpu if is_aligned else self.forward_native
        return forward(positions, query, key)

    def select(self, order: Tensor) -> None:
        """Set the kept dims: ``order`` [C] int64 of :func:`rotation_order`. The cache becomes [P, 2 * (C // 2)]."""
        cos, sin = self._cache_of_all_pairs.chunk(2, dim=-1)
        first_dims = order[: self.rotary_dim // 2]
        pairs = first_dims[first_dims < self._num_pairs]
        shape = len(cos), len(first_dims) - len(pairs)
        angle_0 = cos.new_ones(shape), cos.new_zeros(shape)
        self.cos_sin_cache = torch.cat([cos[:, pairs], angle_0[0], sin[:, pairs], angle_0[1]], dim=-1)
