"""Checkpoints to measure: a random LLaMA of a given shape, and ToMoE with random gates for any dense model.

Random routers load all experts about evenly, and random masks overlap as independent ones do. This is the worst case:
a batch then needs more of the weights than with trained experts. The values of the weights do not affect speed.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from tomoe_vllm.diagnostics.bench.shapes import Shape
from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES, block_shape
from tomoe_vllm.hf.tomoe_math import head_units, pack_signature

NUM_EXPERTS, RANK = 8, 128


def write_dense(shape: Shape, folder: Path) -> None:
    """Write a LLaMA of ``shape`` with random weights (bfloat16 on disk, one file per layer)."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).bfloat16()

    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, f"{name}.safetensors"))

    hidden, neurons = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    write("outside", {"model.embed_tokens.weight": random(shape.vocab_size, hidden), "model.norm.weight": norm})
    for layer in range(shape.num_layers):
        tensors = {
            "self_attn.q_proj": random(queries, hidden),
            "self_attn.k_proj": random(keys, hidden),
            "self_attn.v_proj": random(keys, hidden),
            "self_attn.o_proj": random(hidden, queries),
            "mlp.gate_proj": random(neurons, hidden),
            "mlp.up_proj": random(neurons, hidden),
            "mlp.down_proj": random(hidden, neurons),
            "input_layernorm": norm,
            "post_attention_layernorm": norm.clone(),
        }
        write(f"layer-{layer:02}", {f"model.layers.{layer}.{name}.weight": t for name, t in tensors.items()})
    _write_index(folder, weight_map)


def write_tomoe(dense: Path, folder: Path) -> None:
    """Write a ToMoE checkpoint of ``dense`` at p = 0.5 with random gates, with symbolic links to the dense files.

    The gates keep half of the neurons and half of the Q/K dims. Trained adapters may keep all Q/K dims.
    """
    folder.mkdir(parents=True)
    base = AutoConfig.from_pretrained(dense)
    shape, layers = block_shape(base), base.num_hidden_layers
    half = shape.head_dim // 2
    fields = {
        "num_experts": NUM_EXPERTS,
        "expert_intermediate_sizes": [shape.intermediate_size // 2] * layers,
        "qk_head_dims": [half] * layers,
        "vo_head_dims": [half] * layers,
        "value_router_dim": RANK,
        "active_ratio": 0.5,
    }
    config_class = CONFIG_CLASSES[base.model_type]
    plain = {key: value for key, value in base.to_dict().items() if key not in ("model_type", "architectures")}
    architecture = config_class.__name__.removesuffix("Config") + "ForCausalLM"
    config: PreTrainedConfig = config_class(**plain, **fields, architectures=[architecture])
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for file in sorted(dense.glob("*.safetensors")):
        (folder / file.name).symlink_to(file.resolve())
        with safe_open(file, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file.name)
    for file in dense.glob("token*"):
        (folder / file.name).symlink_to(file.resolve())
    gates = _random_gates(config)
    save_file(gates, folder / "gates.safetensors", metadata={"format": "pt"})
    _write_index(folder, weight_map | dict.fromkeys(gates, "gates.safetensors"))


def _random_gates(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = block_shape(config)
    hidden, neurons = shape.hidden_size, shape.intermediate_size
    units = head_units(shape.head_dim, shape.rotary_dim)
    gates: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        mlp, attention = (
            f"model.layers.{layer}.mlp.expert_gate.",
            f"model.layers.{layer}.self_attn.head_gate.",
        )
        order = torch.rand(NUM_EXPERTS, neurons, generator=generator).argsort(dim=1)
        masks = torch.zeros(NUM_EXPERTS, neurons, dtype=torch.bool).scatter_(1, order[:, : neurons // 2], True)
        kept = torch.rand(int(units.max()) + 1, generator=generator).argsort()[: shape.head_dim // 4]
        gates |= {
            f"{mlp}signature": pack_signature(masks),
            f"{mlp}router.weight": torch.randn(NUM_EXPERTS, hidden, generator=generator),
            f"{attention}query_key_dims": torch.isin(units, kept).to(torch.uint8),
            f"{attention}value_down.weight": torch.randn(RANK, hidden, generator=generator) * hidden**-0.5,
            f"{attention}value_down.bias": torch.randn(RANK, generator=generator),
            f"{attention}value_norm.weight": torch.ones(RANK),
            f"{attention}value_norm.bias": torch.zeros(RANK),
            f"{attention}value_up.weight": torch.randn(shape.head_dim, RANK, generator=generator),
        }
    return gates


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
