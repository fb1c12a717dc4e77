"""Removes pruned dims from an attention layer: rows and columns of its linears, and columns of its rotary table.

RoPE rotates the dims of a head in pairs (i, i + rotary_dim / 2), each pair at its own frequency, and a pair is kept or
dropped as a whole. A head that stores the first dims of its kept pairs before the second ones is therefore rotated by
vLLM's own kernel, given the columns of the kept pairs only. Dims past ``rotary_dim`` (partial rotary, Phi) are paired
with each other at angle 0, which changes no bit. The rotated width then depends on the config alone and not on the
choice of kept dims: compiled graphs contain it as a constant.

On a GPU all layers share vLLM's table of cosines and sines, since a table for each would take 0.5 to 0.8 GB at 131,072
positions. A step looks up the rows of its tokens and takes the layer's columns of them, which torch.compile fuses into
the rotation. On a CPU these are operators of their own (11 us a layer, 2 to 3 % of a decode step of a 135 M model), so
each layer has a table there, as long as ``max_model_len``: 1 / (2 * KV heads) of what one such sequence takes in the KV
cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tomoe_vllm.compat import ops
from tomoe_vllm.compat.layers import RotaryEmbedding, UnquantizedLinearMethod


class PrunedLinearMethod(UnquantizedLinearMethod):
    """Linear method that removes rows (or columns) of the weight after loading.

    vLLM's linear loads and shards the checkpoint's tensor as usual. The kept part replaces it layer by layer, before
    vLLM packs the weight for oneDNN on CPUs, so at most one layer's weight exists twice.

    ``kept()``: int64 indices of the rows of this rank that stay; of the columns with ``is_column=True``. ``bias``: the
    kept part of the layer's bias, with rows only. The layer keeps its whole bias, into which vLLM reloads weights.
    """

    supports_pre_processed_weights = False

    def __init__(self, kept: Callable[[], Tensor], *, is_column: bool = False) -> None:
        super().__init__()
        self.kept, self.dim = kept, int(is_column)
        self.bias: Tensor | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Remove what is not kept, then process the rest as vLLM does with any unquantized weight."""
        kept, whole_bias = self.kept(), layer.bias
        layer.weight = nn.Parameter(layer.weight.data.index_select(self.dim, kept), requires_grad=False)
        has_pruned_bias = self.dim == 0 and whole_bias is not None
        if has_pruned_bias:  # vLLM may convert the bias, too
            layer.bias = nn.Parameter(whole_bias.data[kept], requires_grad=False)
        super().process_weights_after_loading(layer)
        if has_pruned_bias:
            bias, layer.bias = layer.bias.data, whole_bias
            self.bias = bias if self.bias is None else self.bias.copy_(bias)  # CUDA graphs contain its address

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The pruned linear."""
        return super().apply(layer, x, bias if bias is None or self.dim else self.bias)


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
    """``whole``, an embedding of whole heads, for heads of ``width`` kept dims. :meth:`select` sets which dims.

    ``columns``: [C] int64, C = 2 * (width // 2), columns of the table of ``whole``: cosines, then sines of the pairs.
    ``is_rotated``: [C] bool, false for dims past ``rotary_dim``, which have angle 0. ``num_own_rows``: positions of a
    table of this layer, ``own_table`` [num_own_rows, C]; None: look up in the table of ``whole``.
    """

    columns: Tensor
    is_rotated: Tensor
    at_angle_0: Tensor
    own_table: Tensor | None

    def __init__(self, whole: RotaryEmbedding, width: int, *, num_own_rows: int | None = None) -> None:
        super().__init__(
            head_size=width,
            rotary_dim=width // 2 * 2,
            max_position_embeddings=whole.max_position_embeddings,
            base=whole.base,
            is_neox_style=whole.is_neox_style,
            dtype=whole.dtype,
            init_cache=False,
        )
        self.whole = whole
        self.is_partial = whole.rotary_dim < whole.head_size
        is_sine = torch.arange(self.rotary_dim) >= self.rotary_dim // 2
        self.register_buffer("columns", torch.zeros(self.rotary_dim, dtype=torch.int64), persistent=False)
        self.register_buffer("is_rotated", torch.ones(self.rotary_dim, dtype=torch.bool), persistent=False)
        table = whole.cos_sin_cache
        self.register_buffer("at_angle_0", (~is_sine).to(table.dtype), persistent=False)
        own = None if num_own_rows is None else table.new_empty(min(num_own_rows, len(table)), self.rotary_dim)
        self.register_buffer("own_table", own, persistent=False)

    def select(self, order: Tensor) -> None:
        """Set the kept dims. ``order``: [width] int64 of :func:`rotation_order`."""
        num_pairs = self.whole.rotary_dim // 2
        first_dims = order[: self.rotary_dim // 2]
        is_pair = first_dims < num_pairs
        pairs = first_dims.where(is_pair, 0)
        self.columns.copy_(torch.cat([pairs, pairs + num_pairs]))
        self.is_rotated.copy_(is_pair.repeat(2))
        if self.own_table is not None:
            self.own_table.copy_(self._kept_columns(self.whole.cos_sin_cache[: len(self.own_table)]))

    def _kept_columns(self, rows: Tensor) -> Tensor:
        kept = rows.index_select(1, self.columns)
        return kept.where(self.is_rotated, self.at_angle_0) if self.is_partial else kept

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A table of cosines and sines of the kept pairs, [R, C], and its row for each of ``positions`` [T]: [T]."""
        if self.own_table is not None:
            return self.own_table, positions
        table = self._kept_columns(self.whole.cos_sin_cache.index_select(0, positions.flatten()))
        return table, torch.arange(len(table), device=table.device)

    def _rotate(
        self, positions: Tensor, query: Tensor, key: Tensor | None, *, in_torch: bool
    ) -> tuple[Tensor, Tensor | None]:
        table, rows = self.cos_sin(positions)
        table = table.to(query.dtype)
        if in_torch:
            sizes = self.head_size, self.rotary_dim
            return self.forward_static(rows, query, key, *sizes, table, self.is_neox_style)
        ops.rotary_embedding(rows, query, key, self.head_size, table, self.is_neox_style)
        return query, key

    def forward_native(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate queries and keys in plain torch: what torch.compile fuses."""
        return self._rotate(positions, query, key, in_torch=True)

    def forward_cuda(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rotate queries and keys in place with vLLM's kernel."""
        return self._rotate(positions, query, key, in_torch=False)

    def forward_cpu(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rotate queries and keys; plain torch in 16-bit dtypes.

        vLLM's CPU kernel stores eight 16-bit values at an address that it assumes to be aligned. Pruned heads are not
        aligned, and the process dies with a segmentation fault.
        """
        return self._rotate(positions, query, key, in_torch=query.element_size() < 4)
