"""Tiny random ToMoE checkpoints of every family, saved as the Hugging Face reference model saves them.

They have what breaks first: grouped-query attention, biases (also zero-sized), tied and untied embeddings,
widths that differ per layer, and one expert that no token is routed to. Weights are large enough that masks
and routing change the output: with the usual 0.02 everything is close to the embedding and any bug passes.
"""

from pathlib import Path

import torch
from torch import nn

from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES, block_shape
from tomoe_vllm.hf.modeling_tomoe import MODEL_CLASSES
from tomoe_vllm.hf.tomoe_math import head_units, pack_signature

NUM_EXPERTS = 5
UNUSED_EXPERT = 3
VOCAB_SIZE = 96

# head_dim 32 and 64: what vLLM's CPU attention takes at this size. Heads divide by 2 for tensor parallelism.
FAMILY_FIELDS = {
    "llama": {"head_dim": 32, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 32, "sliding_window": None, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64, "attention_bias": False, "tie_word_embeddings": False},
    "phi": {"tie_word_embeddings": False, "hidden_act": "gelu_new"},
}


def tiny_config(family: str, **fields):
    """Config of a three-layer ToMoE model with ragged widths; ``fields`` overrides any of it."""
    defaults = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "phi" else 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "num_experts": NUM_EXPERTS,
        "expert_intermediate_sizes": [32, 64, 48],
        "qk_head_dims": [16, 32, 24],
        "vo_head_dims": [16, 7, 32],
        "value_router_dim": 16,
        "architectures": [MODEL_CLASSES[family].__name__],
    }
    return CONFIG_CLASSES[family](**(defaults | FAMILY_FIELDS[family] | fields))


def tiny_model(family: str, *, seed: int = 0, **fields) -> nn.Module:
    """Random reference model in float32, in eval mode."""
    config = tiny_config(family, **fields)
    generator = torch.Generator().manual_seed(seed)
    model = MODEL_CLASSES[family](config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.rsplit(".", 2)[-2]
            spread = 0.2 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + float(is_norm))
        randomize_gates(model, generator)
    return model


def randomize_gates(model: nn.Module, generator: torch.Generator) -> None:
    """Random masks of exactly the widths that the config names; also routers, with one expert never chosen."""
    config = model.config
    shape = block_shape(config)
    units = head_units(shape.head_dim, shape.rotary_dim)
    for layer_idx, layer in enumerate(model.model.layers):
        experts, heads = layer.mlp.expert_gate, layer.self_attn.head_gate
        width = config.expert_intermediate_sizes[layer_idx]
        order = torch.rand(config.num_experts, shape.intermediate_size, generator=generator).argsort(dim=-1)
        masks = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :width], True)
        experts.signature.copy_(pack_signature(masks))
        if config.num_experts > 1:
            _disable_expert(experts.router, UNUSED_EXPERT % config.num_experts)
        heads.query_key_dims.copy_(_random_dims(units, config.qk_head_dims[layer_idx], generator))
        if config.vo_mode == "static":
            order = torch.rand(shape.head_dim, generator=generator).argsort()
            heads.value_dims.zero_()[order[: config.vo_head_dims[layer_idx]]] = 1


def _random_dims(units: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """Whole units (RoPE pairs, single dims) in random order until exactly ``width`` dims are kept."""
    kept = torch.zeros(len(units), dtype=torch.uint8)
    for unit in torch.rand(int(units.max()) + 1, generator=generator).argsort().tolist():
        dims = units == unit
        if int(kept.sum()) + int(dims.sum()) <= width:
            kept[dims] = 1
    assert int(kept.sum()) == width
    return kept


def _disable_expert(router: nn.Linear, expert: int) -> None:
    """Give the expert the mean of two others' rows: its logit is never above both."""
    others = [i for i in range(router.out_features) if i != expert][:2]
    router.weight[expert] = router.weight[others].mean(dim=0)


def save_tiny_model(folder: Path, family: str, *, seed: int = 0, **fields) -> nn.Module:
    """Save a checkpoint in ``folder`` and return its model. No tokenizer: prompts are token ids."""
    model = tiny_model(family, seed=seed, **fields)
    model.save_pretrained(folder)
    return model
