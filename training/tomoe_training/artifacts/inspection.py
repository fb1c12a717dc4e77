"""``tomoe inspect``: parameters, bytes and FLOPs of a checkpoint, by the paper's count and as served; adapters."""

from pathlib import Path

import torch
from transformers import AutoConfig

from tomoe_training.artifacts.adapter import ADAPTER_CONFIG, ADAPTER_TENSORS, Adapter
from tomoe_training.artifacts.export import TOMOE_SHARD
from tomoe_training.artifacts.model_check import model_tensors
from tomoe_training.artifacts.safetensors_io import read_config, read_header
from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.hf.register import register_configs
from tomoe_vllm.hf.tomoe_math import BlockShape
from tomoe_vllm.layers.attention.kv_layout import (
    CPU_HEAD_SIZES,
    diffkv_widths,
    kept_widths,
    padded_widths,
    values_per_token,
)


def inspect(folder: Path) -> dict:
    """Facts about an adapter or checkpoint folder, JSON-ready. Raises ``ValueError`` for any other folder."""
    return _inspect_adapter(folder) if (folder / ADAPTER_CONFIG).is_file() else _inspect_checkpoint(folder)


def _inspect_adapter(folder: Path) -> dict:
    adapter = Adapter.load(folder)
    config = adapter.config
    tensors = read_header(folder / ADAPTER_TENSORS)
    return {
        "kind": "adapter",
        "base_model": config.base_model_name,
        "base_model_type": config.base_model_type,
        "base_model_hash": config.base_model_hash,
        "num_layers": config.num_layers,
        "num_experts": config.num_experts,
        "vo_mode": config.vo_mode,
        "active_ratio_target": config.active_ratio,
        "steps": config.training.get("steps"),
        "tokens": config.training.get("tokens"),
        "bytes": sum(tensor.num_bytes for tensor in tensors.values()),
    }


def _inspect_checkpoint(folder: Path) -> dict:
    register_configs()
    read_config(folder)
    config = AutoConfig.from_pretrained(folder)
    if not config.model_type.startswith("tomoe_"):
        raise ValueError(f"{folder} is a dense {config.model_type} model, not a ToMoE checkpoint or adapter")
    tensors = model_tensors(folder, config)
    shape = block_shape(config)
    widths = (config.qk_head_dims, config.vo_head_dims, config.expert_intermediate_sizes)
    active = sum(int(shape.active_parameters(*dims)) for dims in zip(*widths, strict=True))
    total = shape.total_parameters * config.num_hidden_layers
    routers = shape.router_parameters(config.num_experts, config.value_router_dim, config.vo_mode)
    outside = _parameters_outside_blocks(config)
    return {
        "kind": "checkpoint",
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_experts": config.num_experts,
        "vo_mode": config.vo_mode,
        "active_ratio": active / total,
        "active_ratio_target": config.active_ratio,
        "active_block_parameters": active,
        "total_block_parameters": total,
        "router_parameters": routers * config.num_hidden_layers,
        "embedding_and_head_parameters": outside,
        "active_parameters": active + routers * config.num_hidden_layers + outside,
        "total_parameters": total + outside,
        "read_parameters_per_token": _read_parameters_per_token(config, shape),
        "kv_bytes_per_token": _kv_bytes(config),
        "expert_intermediate_sizes": config.expert_intermediate_sizes,
        "qk_head_dims": config.qk_head_dims,
        "vo_head_dims": config.vo_head_dims,
        "tomoe_bytes": sum(t.num_bytes for t in tensors.values() if t.file.name == TOMOE_SHARD),
        "total_bytes": sum(t.num_bytes for t in tensors.values()),
    }


def _read_parameters_per_token(config, shape: BlockShape) -> dict[str, dict[str, int]]:
    """Parameters that the server reads per token, FLOPs per token, and resident parameters, by expert layout.

    For weights without quantization and LoRA. With either, heads are not pruned and the layout is masked.
    """
    layers, outside = range(config.num_hidden_layers), _parameters_outside_blocks(config)
    heads = shape.hidden_size * (shape.num_heads + shape.num_kv_heads)
    neuron = shape.num_mlp_matrices * shape.hidden_size
    kept = [kept_widths(config, i) for i in layers]
    attention = heads * sum(widths.query_key + widths.value for widths in kept)
    routers = sum(_router_parameters(config, shape, i) for i in layers)
    whole = neuron * shape.intermediate_size * config.num_hidden_layers
    expert = neuron * sum(config.expert_intermediate_sizes)
    head = config.vocab_size * config.hidden_size

    def layout(mlp_read: int, mlp_resident: int) -> dict[str, int]:
        read = attention + mlp_read + routers
        return {
            "attention_parameters": attention,
            "mlp_parameters": mlp_read,
            "router_parameters": routers,
            "lm_head_parameters": head,
            "flops": 2 * (read + head),
            "resident_parameters": attention + mlp_resident + routers + outside,
        }

    return {
        "shared": layout(expert, whole),
        "masked": layout(whole, whole),
        "fused": layout(expert, config.num_experts * expert),
    }


def _router_parameters(config, shape: BlockShape, layer_idx: int) -> int:
    """Router parameters that are read: a value router that keeps every dim is not evaluated."""
    has_value_router = config.vo_mode == "dynamic" and config.vo_head_dims[layer_idx] < shape.head_dim
    return shape.router_parameters(
        config.num_experts, config.value_router_dim, "dynamic" if has_value_router else "none"
    )


def _kv_bytes(config) -> dict[str, int | str]:
    """Bytes that one token adds to the KV cache in the checkpoint's dtype, by ``kv_layout``.

    ``padded`` is for GPUs; CPUs may support a smaller head size.
    """
    dtype = config.dtype or torch.float32
    layouts = {
        "dense": padded_widths(config),
        "padded": padded_widths(config),
        "padded_on_cpu": padded_widths(config, CPU_HEAD_SIZES),
        "diffkv": diffkv_widths(config),
    }
    numbers = {name: values_per_token(config, widths) * dtype.itemsize for name, widths in layouts.items()}
    return {"dtype": str(dtype).removeprefix("torch."), **numbers}


def _parameters_outside_blocks(config) -> int:
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
