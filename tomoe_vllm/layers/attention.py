"""The attention of ToMoE in its exact masked form: masks on q, k and on the attention output.

Pruned Q/K dims are zero (a RoPE pair shares its mask, so doing it before RoPE is the same): their rows of W_q and W_k
are zeroed once the weights are loaded, or, where that is not exact, q and k are multiplied by the mask. And
each token's own value mask multiplies the attention output (eq. 4 read literally), so the KV cache, every
attention backend and prefix caching stay as they are. The scale is that of the unpruned head. What it gives
up: no FLOP and no cache byte is saved here.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import CacheConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.utils import set_weight_attrs

from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of
from tomoe_vllm.hf.tomoe_math import mask_heads
from tomoe_vllm.kernels.value_mask import mask_values


class ToMoEHeadGate(nn.Module):
    """Masks over the dims of a head. All heads share them, so every tensor-parallel rank holds all of it.

    ``query_key_dims``, ``value_dims`` (vo_mode static): [A] uint8, the checkpoint's masks, with the same in the
    model's dtype beside them. A mask that keeps every dim is skipped.
    """

    query_key_mask: Tensor
    static_value_mask: Tensor

    def __init__(self, config: PreTrainedConfig, layer_idx: int, prefix: str) -> None:
        super().__init__()
        shape, rank = block_shape(config), config.value_router_dim
        self.prefix = prefix
        self.vo_mode, self.top_k = config.vo_mode, config.vo_head_dims[layer_idx]
        self.widths = {"query_key_dims": config.qk_head_dims[layer_idx], "value_dims": self.top_k}
        self._keeps_all = {name: width == shape.head_dim for name, width in self.widths.items()}
        self._add_dims("query_key_dims", "query_key_mask", shape.head_dim)
        if self.vo_mode == "static":
            self._add_dims("value_dims", "static_value_mask", shape.head_dim)
        elif self.vo_mode == "dynamic":
            self.value_down = nn.Linear(shape.hidden_size, rank, dtype=torch.float32)
            self.value_norm = nn.LayerNorm(rank, dtype=torch.float32)
            self.value_up = nn.Linear(rank, shape.head_dim, bias=False, dtype=torch.float32)

    def _add_dims(self, name: str, mask_name: str, head_dim: int) -> None:
        def load(parameter: nn.Parameter, loaded: Tensor) -> None:
            if loaded.shape != parameter.shape or loaded.dtype != torch.uint8:
                raise ValueError(
                    f"{self.prefix}.{name} is {loaded.dtype} {list(loaded.shape)}; it must be uint8 [{head_dim}]"
                )
            if (kept := int(loaded.count_nonzero())) != self.widths[name]:
                raise ValueError(
                    f"{self.prefix}.{name} keeps {kept} dims; config.json says {self.widths[name]}. "
                    "Export the checkpoint again"
                )
            parameter.data.copy_(loaded)
            self.get_buffer(mask_name).copy_(loaded)

        parameter = nn.Parameter(torch.ones(head_dim, dtype=torch.uint8), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": load})
        self.register_parameter(name, parameter)
        self.register_buffer(mask_name, torch.ones(head_dim), persistent=False)

    def fold_query_key(self, weight: Tensor, bias: Tensor | None, num_rows: int) -> None:
        """Zero the rows of pruned dims among the first ``num_rows`` (q and k), so that nothing is left to mask.

        ``weight``: [rows, D]; ``bias``: [rows] or None. The same as multiplying q and k by the mask.
        """
        for rows in (weight, bias):
            if rows is not None:
                heads = rows[:num_rows].unflatten(0, (-1, len(self.query_key_mask)))
                heads[:, self.query_key_mask == 0] = 0
        self._keeps_all["query_key_dims"] = True

    def mask_query_key(self, heads: Tensor) -> Tensor:
        """Zero the pruned dims of every head: [T, H * A] -> the same."""
        return heads if self._keeps_all["query_key_dims"] else mask_heads(heads, self.query_key_mask)

    def mask_value(self, attention: Tensor, hidden_states: Tensor) -> Tensor:
        """Zero what each token's value mask drops: attention [T, H * A], hidden states [T, D] -> [T, H * A]."""
        if self.vo_mode == "none" or self._keeps_all["value_dims"]:
            return attention
        if self.vo_mode == "static":
            return mask_heads(attention, self.static_value_mask)
        down, norm, up = self.value_down, self.value_norm, self.value_up
        return mask_values(
            attention, hidden_states, down.weight, down.bias, norm.weight, norm.bias, up.weight, self.top_k
        )


class ToMoEAttention(nn.Module):
    """Self-attention of one layer on vLLM's linears, rotary embedding and attention backend.

    Raises ``ValueError`` for a tensor parallel size that does not divide the heads, or a head size that the
    platform's attention backend does not take (vLLM's CPU backend would fail at the first request).
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
        tp_size = get_tensor_model_parallel_world_size()
        _check_heads(shape.num_heads, shape.num_kv_heads, tp_size)
        num_heads, num_kv_heads = shape.num_heads // tp_size, max(1, shape.num_kv_heads // tp_size)
        self.head_dim = shape.head_dim
        self.sizes = [num_heads * shape.head_dim, num_kv_heads * shape.head_dim, num_kv_heads * shape.head_dim]
        self.head_gate = ToMoEHeadGate(config, layer_idx, f"{prefix}.head_gate")
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            shape.head_dim,
            shape.num_heads,
            shape.num_kv_heads,
            bias=qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        # The output projection keeps its family's name (o_proj, or dense in Phi): LoRA adapters and
        # quantization configs name modules as Hugging Face does.
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
        self.is_plain = quant_config is None and get_current_vllm_config().lora_config is None
        if has_qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            shape.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            num_heads,
            shape.head_dim,
            scale=shape.head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        backend = self.attn.attn_backend
        if not backend.supports_head_size(shape.head_dim):
            raise ValueError(
                f"head_dim is {shape.head_dim}; vLLM's {backend.get_name()} attention backend takes "
                f"{', '.join(map(str, backend.get_supported_head_sizes()))}. Serve this model on another platform"
            )

    def finish_loading(self) -> None:
        """Once the weights are there: let q and k come out masked, where that is exact.

        Not after a norm on q and k, and not where the weight is quantized or LoRA adds to it.
        """
        if self.is_plain and not self.has_qk_norm:
            projection = self.qkv_proj
            bias = projection.bias.data if projection.bias is not None else None
            self.head_gate.fold_query_key(projection.weight.data, bias, sum(self.sizes[:2]))

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``positions``: [T]; [T, D] -> [T, D]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.has_qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.head_gate.mask_query_key(q), self.head_gate.mask_query_key(k)
        q, k = self.rotary_emb(positions, q, k)
        attn_output = self.attn(q, k, v)
        output, _ = getattr(self, self.output_name)(self.head_gate.mask_value(attn_output, hidden_states))
        return output


def _check_heads(num_heads: int, num_kv_heads: int, tp_size: int) -> None:
    if num_heads % tp_size or (num_kv_heads % tp_size and tp_size % num_kv_heads):
        raise ValueError(
            f"tensor parallel size {tp_size} does not fit {num_heads} attention heads and {num_kv_heads} key/value "
            "heads; it must divide the first, and divide the second or be a multiple of it"
        )
