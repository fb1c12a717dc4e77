"""Head sizes of keys and values in the KV cache, from the config alone. Used by the layers and by `tomoe inspect`.

Pruned dims need no cache, but a backend supports certain head sizes only, and the same ones in all layers:

    padded   one size for keys and values, padded with zeros; every backend supports it. It is smaller than head_dim
             only on CPUs, and only if keys *and* values of all layers fit (values do if their mask is static)
    diffkv   vLLM's TRITON_ATTN_DIFFKV (CUDA): keys and values of different sizes

``kv_layout`` of the config chooses. ``auto`` means ``padded`` until ``diffkv`` has been measured on a GPU.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of

KV_LAYOUTS = ("auto", "padded", "diffkv")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's CPU backend supports. A test compares them with the installed vLLM."""
DIFFKV_MULTIPLE, DIFFKV_SMALLEST = 16, 32
"""Key sizes of diffkv: multiples of 16 (the K of a tensor-core instruction; keeps rows aligned), at least 32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadWidths:
    """Dims of one key (and query) and of one value vector."""

    query_key: int
    value: int


def kept_widths(config: PreTrainedConfig, layer_idx: int) -> HeadWidths:
    """Dims that remain of a head of layer ``layer_idx`` after unused dims are removed.

    Values stay whole unless their mask is static. Queries and keys stay whole behind a norm over the head (Qwen-3).
    """
    head_dim = block_shape(config).head_dim
    has_norm = not family_of(config).query.endswith("_proj")
    return HeadWidths(
        query_key=head_dim if has_norm else config.qk_head_dims[layer_idx],
        value=config.vo_head_dims[layer_idx] if config.vo_mode == "static" else head_dim,
    )


def _widest(config: PreTrainedConfig) -> HeadWidths:
    widths = [kept_widths(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
    return HeadWidths(query_key=max(w.query_key for w in widths), value=max(w.value for w in widths))


def padded_widths(config: PreTrainedConfig, head_sizes: tuple[int, ...] = ()) -> HeadWidths:
    """Size of ``padded``: the smallest of ``head_sizes`` that fits every layer, or head_dim if none does."""
    widest, head_dim = _widest(config), block_shape(config).head_dim
    needed = max(widest.query_key, widest.value)
    size = min((size for size in head_sizes if needed <= size < head_dim), default=head_dim)
    return HeadWidths(query_key=size, value=size)


def diffkv_widths(config: PreTrainedConfig) -> HeadWidths:
    """Sizes of ``diffkv``, the same for all layers."""
    widest = _widest(config)
    rounded = -(-widest.query_key // DIFFKV_MULTIPLE) * DIFFKV_MULTIPLE
    return HeadWidths(query_key=max(DIFFKV_SMALLEST, rounded), value=widest.value)


def values_per_token(config: PreTrainedConfig, widths: HeadWidths) -> int:
    """Number of values that one token adds to the KV cache, over all layers."""
    num_heads = block_shape(config).num_kv_heads * config.num_hidden_layers
    return num_heads * (widths.query_key + widths.value)
