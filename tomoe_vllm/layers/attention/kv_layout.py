"""How wide keys and values lie in the KV cache: what the layers build, and what `tomoe inspect` says of it.

Pruned dims need no room, but a backend takes certain head sizes only, and the same for keys and values of all layers:

    padded   one size for both, zeros up to it: what every backend takes. Smaller than head_dim only where keys *and*
             values of all layers fit a smaller size (values do if their mask is static), and on CPUs only
    diffkv   vLLM's TRITON_ATTN_DIFFKV (CUDA): keys and values of different sizes

``kv_layout`` of the config chooses; ``auto`` is ``padded``, until ``diffkv`` has been measured on a GPU.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of

KV_LAYOUTS = ("auto", "padded", "diffkv")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM 0.32's CPU backend (a test compares them with its own list)."""
DIFFKV_MULTIPLE, DIFFKV_SMALLEST = 16, 32
"""Key sizes of diffkv: 16 is the depth of a tensor core's step and keeps rows aligned; the kernel takes 32 and up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadWidths:
    """Dims of one key (and query) and of one value vector."""

    query_key: int
    value: int


def kept_widths(config: PreTrainedConfig, layer_idx: int) -> HeadWidths:
    """Dims that are left of a head of layer ``layer_idx`` once what nobody uses is cut off.

    Values are whole unless their mask is the same for all tokens. So are queries and keys behind a norm (Qwen-3):
    it reads the whole head.
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
    """The one size of ``padded``: the smallest of ``head_sizes`` that holds every layer, or head_dim without such."""
    widest, head_dim = _widest(config), block_shape(config).head_dim
    needed = max(widest.query_key, widest.value)
    size = min((size for size in head_sizes if needed <= size < head_dim), default=head_dim)
    return HeadWidths(query_key=size, value=size)


def diffkv_widths(config: PreTrainedConfig) -> HeadWidths:
    """The two sizes of ``diffkv``, the same for all layers."""
    widest = _widest(config)
    rounded = -(-widest.query_key // DIFFKV_MULTIPLE) * DIFFKV_MULTIPLE
    return HeadWidths(query_key=max(DIFFKV_SMALLEST, rounded), value=widest.value)


def values_per_token(config: PreTrainedConfig, widths: HeadWidths) -> int:
    """Numbers that one token adds to the cache of all layers."""
    num_heads = block_shape(config).num_kv_heads * config.num_hidden_layers
    return num_heads * (widths.query_key + widths.value)
