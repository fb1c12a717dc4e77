"""Attention of ToMoE, assembled from vLLM's linears, rotary embedding and attention backends.

Dims that no token uses are removed from the weights after loading (``pruning.py``): the rows of pruned Q/K dims and,
if the value mask is the same for all tokens, those of V and the columns of the output projection. Heads are padded
with zeros to the head size of the KV cache (``kv_layout.py``). Zeros add nothing to q.k, and the softmax scale stays
that of the whole head. A value mask that depends on the token multiplies the attention output (eq. 4, literally), so
the cache keeps whole values.

Where removal is not exact, heads stay whole and masks multiply instead: behind a norm over the whole head (q and k of
Qwen-3), in quantized checkpoints, with LoRA (adapters have the size of whole heads), and with rotary embeddings that
are more than a table look-up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import CacheConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

from tomoe_vllm.compat.layers import diffkv_backend, replace_quant_method
from tomoe_vllm.compat.reload import HookedAttention, process_last
from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of
from tomoe_vllm.layers.attention.head_mask import ToMoEHeadMask
from tomoe_vllm.layers.attention.kv_layout import (
    CPU_HEAD_SIZES,
    KV_LAYOUTS,
    HeadWidths,
    diffkv_widths,
    kept_widths,
    padded_widths,
)
from tomoe_vllm.layers.attention.pruning import (
    PrunedLinearMethod,
    SelectedRotaryEmbedding,
    is_plain_rotary,
    rotation_order,
)
from tomoe_vllm.layers.norm import ToMoERMSNorm


class ToMoEAttention(nn.Module):
    """Self-attention of one layer.

    Raises ``ValueError`` for a tensor parallel size that does not divide the heads, a head size that the platform's
    attention backend does not support (vLLM's CPU backend would fail at the first request only), or a ``kv_layout``
    that is unknown or unavailable.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        qkv_bias: bool,
        output_bias: bool,
        has_qk_norm: bool,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        shape = block_shape(config)
        self.head_dim, self.rotary_dim = shape.head_dim, shape.rotary_dim
        tp_size = get_tensor_model_parallel_world_size()
        _check_heads(shape.num_heads, shape.num_kv_heads, tp_size)
        self.num_heads, self.num_kv_heads = shape.num_heads // tp_size, max(1, shape.num_kv_heads // tp_size)

        self.head_gate = ToMoEHeadMask(config, layer_idx, f"{prefix}.head_gate")
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            shape.head_dim,
            shape.num_heads,
            shape.num_kv_heads,
            bias=qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        # The output projection keeps the name of its family (o_proj, or dense in Phi), because LoRA adapters and
        # quantization configs refer to modules by their Hugging Face names.
        self.output_name = family_of(config).attention_out.rpartition(".")[2]
        output = RowParallelLinear(
            shape.num_heads * shape.head_dim,
            shape.hidden_size,
            bias=output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.{self.output_name}",
        )
        self.add_module(self.output_name, output)
        self.has_qk_norm = has_qk_norm
        if has_qk_norm:
            self.q_norm = ToMoERMSNorm(shape.head_dim, eps=config.rms_norm_eps)
            self.k_norm = ToMoERMSNorm(shape.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            shape.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )

        has_lora = get_current_vllm_config().lora_config is not None
        is_pruned = quant_config is None and not has_lora and is_plain_rotary(self.rotary_emb)
        self.kept = HeadWidths(query_key=shape.head_dim, value=shape.head_dim)
        if is_pruned:
            self._prune(kept_widths(config, layer_idx), output)
        self.cached, backend = choose_cache(config, is_pruned)
        self.attn = HookedAttention(
            self.num_heads,
            self.cached.query_key,
            scale=shape.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=backend,
            head_size_v=self.cached.value,
        )
        _check_head_size(self.attn.attn_backend, shape.head_dim, self.cached.query_key)

    def _prune(self, kept: HeadWidths, output: RowParallelLinear) -> None:
        """Prepare the linears and the rotary embedding for heads of ``kept`` dims. Weights are pruned after loading."""
        if kept != self.kept:
            replace_quant_method(self.qkv_proj, PrunedLinearMethod(self._kept_rows))
            process_last(self.qkv_proj.weight)  # the masks come first
            num_own_rows = get_current_vllm_config().model_config.max_model_len if current_platform.is_cpu() else None
            self.rotary_emb = SelectedRotaryEmbedding(self.rotary_emb, kept.query_key, num_own_rows=num_own_rows)
        if kept.value < self.head_dim:
            replace_quant_method(output, PrunedLinearMethod(self._kept_columns, is_column=True))
            process_last(output.weight)
        self.kept = kept

    def finish_loading(self) -> None:
        """Set the masks and the rotated dims, after loading."""
        self.head_gate.finish_loading()
        if isinstance(self.rotary_emb, SelectedRotaryEmbedding):
            self.rotary_emb.select(self._query_key_order())

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Self-attention of T tokens. ``positions``: [T] int64; ``hidden_states``: [T, D]. Returns [T, D]."""
        qkv, _ = self.qkv_proj(hidden_states)
        query_key, value = self.kept.query_key, self.kept.value
        sizes = [self.num_heads * query_key, self.num_kv_heads * query_key, self.num_kv_heads * value]
        q, k, v = qkv.split(sizes, dim=-1)
        if self.has_qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        if query_key == self.head_dim:  # whole heads: the mask was not applied to the weights
            q, k = self.head_gate.mask_query_key(q), self.head_gate.mask_query_key(k)
        q, k = self.rotary_emb(positions, q, k)
        q, k = (_resize_heads(heads, query_key, self.cached.query_key) for heads in (q, k))
        attention = self.attn(q, k, _resize_heads(v, value, self.cached.value))
        attention = _resize_heads(attention, self.cached.value, value)
        if value == self.head_dim:
            attention = self.head_gate.mask_value(attention, hidden_states)
        output, _ = getattr(self, self.output_name)(attention)
        return output

    def _kept_rows(self) -> Tensor:
        """Row indices kept in this rank's qkv_proj, [rows] int64."""
        value = self._kept_dims("value_dims", self.kept.value).nonzero().flatten()
        num_before = self.num_heads + self.num_kv_heads
        return torch.cat(
            [
                self._in_all_heads(self._query_key_order(), num_before),
                num_before * self.head_dim + self._in_all_heads(value, self.num_kv_heads),
            ]
        )

    def _query_key_order(self) -> Tensor:
        """Dims of a query or key, in the order in which they are stored and rotated: [C] int64."""
        return rotation_order(self._kept_dims("query_key_dims", self.kept.query_key), self.rotary_dim)

    def _kept_dims(self, name: str, width: int) -> Tensor:
        """The checkpoint's mask ``name``, [A], or all dims where heads stay whole."""
        is_pruned = width < self.head_dim
        return self.head_gate.kept_dims(name) if is_pruned else torch.ones_like(self.head_gate.query_key_dims)

    def _kept_columns(self) -> Tensor:
        """Column indices kept in this rank's output projection, [columns] int64."""
        return self._in_all_heads(self.head_gate.kept_dims("value_dims").nonzero().flatten(), self.num_heads)

    def _in_all_heads(self, dims: Tensor, num_heads: int) -> Tensor:
        """Dims of one head, [C], as indices into ``num_heads`` whole heads: [num_heads * C]."""
        starts = torch.arange(num_heads, device=dims.device) * self.head_dim
        return (starts[:, None] + dims).flatten()


def choose_cache(config: PreTrainedConfig, is_pruned: bool) -> tuple[HeadWidths, type | None]:
    """Head sizes of the KV cache, the same in all layers, and the attention backend they need (None: vLLM's choice).

    ``is_pruned``: whether pruned dims are removed from the weights. Raises ``ValueError`` for an unknown ``kv_layout``
    in the config, or for ``diffkv`` where it is unavailable.
    """
    layout = getattr(config, "kv_layout", "auto")
    if layout not in KV_LAYOUTS:
        raise ValueError(f"kv_layout is {layout!r}; it must be one of {', '.join(KV_LAYOUTS)}")
    if layout != "diffkv":
        has_fixed_sizes = is_pruned and current_platform.is_cpu()
        return padded_widths(config, CPU_HEAD_SIZES if has_fixed_sizes else ()), None
    if not current_platform.is_cuda():
        raise ValueError("kv_layout is 'diffkv', which needs an NVIDIA GPU; use 'auto' or 'padded'")
    if not is_pruned:
        raise ValueError(
            "kv_layout is 'diffkv', but quantized checkpoints, LoRA and this rotary embedding keep whole heads; "
            "use 'auto' or 'padded'"
        )
    widths = diffkv_widths(config)
    return widths, diffkv_backend(widths.value)


def _resize_heads(heads: Tensor, width: int, size: int) -> Tensor:
    """Pad each head with zeros, or truncate it: [T, H * width] -> [T, H * size]."""
    if width == size:
        return heads
    split = heads.unflatten(-1, (-1, width))
    return (F.pad(split, (0, size - width)) if width < size else split[..., :size]).flatten(-2)


def _check_head_size(backend: Any, head_dim: int, head_size: int) -> None:
    if not backend.supports_head_size(head_size):
        raise ValueError(
            f"head_dim is {head_dim}; vLLM's {backend.get_name()} attention backend supports "
            f"{', '.join(map(str, backend.get_supported_head_sizes()))}. Serve this model on another platform"
        )


def _check_heads(num_heads: int, num_kv_heads: int, tp_size: int) -> None:
    if num_heads % tp_size or (num_kv_heads % tp_size and tp_size % num_kv_heads):
        raise ValueError(
            f"tensor parallel size {tp_size} does not fit {num_heads} attention heads and {num_kv_heads} key/value "
            "heads; it must divide the first, and divide the second or be a multiple of it"
        )
