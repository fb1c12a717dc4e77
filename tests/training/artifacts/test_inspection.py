"""Counts of ``tomoe inspect`` against counts over the tensors."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tomoe_training.artifacts.export import TOMOE_SHARD, export_checkpoint
from tomoe_training.artifacts.inspection import inspect
from transformers import AutoConfig

from tests.helpers.dense_models import FAMILIES
from tests.helpers.students import save_untrained_adapter


@pytest.fixture(params=[(f, m) for f in FAMILIES for m in ("dynamic", "static", "none")], ids="-".join)
def checkpoint(request, dense_folder, tmp_path):
    family, vo_mode = request.param
    save_untrained_adapter(tmp_path / "adapter", dense_folder(family), vo_mode=vo_mode)
    export_checkpoint(
        dense_folder(family), tmp_path / "adapter", tmp_path / "out", width_multiple=8, head_dim_multiple=4
    )
    return tmp_path / "out"


def _matrices(folder):
    return {n: t for f in folder.glob("model-*.safetensors") for n, t in load_file(f).items() if t.dim() == 2}


def test_counts_are_those_of_the_tensors(checkpoint):
    facts, tensors = inspect(checkpoint), _matrices(checkpoint)
    dense = {n: t for n, t in tensors.items() if "_gate." not in n}
    blocks = sum(t.numel() for n, t in dense.items() if ".layers." in n)
    outside = sum(t.numel() for n, t in dense.items() if ".layers." not in n)
    routers = sum(t.numel() for n, t in tensors.items() if "_gate." in n and t.dtype == torch.float32)
    assert facts["total_block_parameters"] == blocks
    assert facts["embedding_and_head_parameters"] == outside
    assert facts["router_parameters"] == routers
    assert facts["active_parameters"] == facts["active_block_parameters"] + routers + outside


def test_read_parameters_are_those_of_the_cut_tensors(checkpoint):
    """Row by row of the checkpoint's own matrices: what the layers of vLLM keep of each, and what a token touches."""
    facts, gates, tensors = inspect(checkpoint), load_file(checkpoint / TOMOE_SHARD), _matrices(checkpoint)
    attention = mlp = expert = routers = 0
    for name, tensor in tensors.items():
        if ".layers." not in name:
            continue
        layer, numbers = name.split(".")[2], tensor.numel()
        gate = f"model.layers.{layer}.self_attn.head_gate"
        if name.endswith(("q_proj.weight", "k_proj.weight")) and "qwen3" not in facts["model_type"]:
            attention += numbers * gates[f"{gate}.query_key_dims"].float().mean().item()
        elif ".self_attn." in name and "_gate." not in name:
            is_value = not name.endswith(("q_proj.weight", "k_proj.weight"))
            dims = gates.get(f"{gate}.value_dims") if is_value else None
            attention += numbers * (1.0 if dims is None else dims.float().mean().item())
        elif ".mlp." in name and "_gate." not in name:
            signature = gates[f"model.layers.{layer}.mlp.expert_gate.signature"]
            mlp += numbers
            expert += numbers * (signature & 1).float().mean().item()
        elif tensor.dtype == torch.float32:
            is_whole = facts["vo_head_dims"][int(layer)] == len(gates[f"{gate}.query_key_dims"])
            routers += 0 if "value_" in name and is_whole else numbers
    head = next(t for n, t in tensors.items() if ".layers." not in n).numel()
    outside, num_experts = facts["embedding_and_head_parameters"], facts["num_experts"]
    for layout, read, resident in (
        ("shared", expert, mlp),
        ("masked", mlp, mlp),
        ("fused", expert, num_experts * expert),
    ):
        assert facts["read_parameters_per_token"][layout] == {
            "attention_parameters": pytest.approx(attention),
            "mlp_parameters": pytest.approx(read),
            "router_parameters": routers,
            "lm_head_parameters": head,
            "flops": pytest.approx(2 * (attention + read + routers + head)),
            "resident_parameters": pytest.approx(attention + resident + routers + outside),
        }


def test_kv_bytes_are_those_of_the_cache_vllm_would_allocate(checkpoint):
    """Head sizes by hand: the dense one, and what is left of q and k and of v in the widest layer."""
    facts = inspect(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 4 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", 0) or config.num_attention_heads)
    query_key = head_dim if config.model_type == "tomoe_qwen3" else max(facts["qk_head_dims"])
    value = max(facts["vo_head_dims"]) if facts["vo_mode"] == "static" else head_dim
    assert facts["kv_bytes_per_token"] == {
        "dtype": "float32",
        "dense": numbers * 2 * head_dim,
        "padded": numbers * 2 * head_dim,
        "padded_on_cpu": numbers * 2 * head_dim,
        "diffkv": numbers * (max(32, -(-query_key // 16) * 16) + value),
    }


def test_active_parameters_are_those_after_slicing(checkpoint):
    facts, gates = inspect(checkpoint), load_file(checkpoint / TOMOE_SHARD)
    active = 0
    for name, tensor in _matrices(checkpoint).items():
        if ".layers." not in name or "_gate." in name:
            continue
        layer, (rows, columns) = int(name.split(".")[2]), tensor.shape
        kept_qk = gates[f"model.layers.{layer}.self_attn.head_gate.query_key_dims"].float().mean().item()
        vo = facts["vo_head_dims"][layer] / len(gates[f"model.layers.{layer}.self_attn.head_gate.query_key_dims"])
        signature = gates[f"model.layers.{layer}.mlp.expert_gate.signature"]
        mlp = ((signature[:, 0] & 1) > 0).float().mean().item()
        share = mlp if ".mlp." in name else kept_qk if "q_proj" in name or "k_proj" in name else vo
        active += rows * columns * share
    assert facts["active_block_parameters"] == pytest.approx(active, rel=1e-6)
    assert facts["active_ratio"] == pytest.approx(active / facts["total_block_parameters"], rel=1e-6)
    assert facts["active_ratio"] <= facts["active_ratio_target"] == 0.6


def test_bytes_are_those_on_disk(checkpoint):
    facts = inspect(checkpoint)
    tensors = {f.name: load_file(f) for f in checkpoint.glob("*.safetensors")}
    assert facts["tomoe_bytes"] == sum(t.nbytes for t in tensors[TOMOE_SHARD].values())
    assert facts["total_bytes"] == sum(t.nbytes for file in tensors.values() for t in file.values())


def test_adapter_facts(adapter_folder):
    facts = inspect(adapter_folder())
    assert (facts["kind"], facts["base_model_type"], facts["num_layers"], facts["num_experts"]) == (
        "adapter",
        "llama",
        2,
        4,
    )
    assert facts["bytes"] == sum(t.nbytes for t in load_file(adapter_folder() / "adapter.safetensors").values())


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.mlp.expert_gate.router.weight"],
)
@pytest.mark.parametrize("damage", ["missing", "another shape"])
def test_incomplete_checkpoint_is_refused(name, damage, dense_folder, adapter_folder, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(dense_folder(), adapter_folder(), out, width_multiple=8, head_dim_multiple=4)
    file = out / (TOMOE_SHARD if "_gate" in name else "model-dense.safetensors")
    tensors = load_file(file)
    tensor = tensors.pop(name)
    if damage == "another shape":
        tensors[name] = torch.cat([tensor, tensor])
    file.unlink()  # a hard link to the base's
    save_file(tensors, file, metadata={"format": "pt"})
    message = f"lacks the tensor {name} of" if damage == "missing" else f"{name} is .* and its config.json says"
    with pytest.raises(ValueError, match=message):
        inspect(out)
