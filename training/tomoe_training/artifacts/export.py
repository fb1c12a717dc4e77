"""Export: adapter + base model -> checkpoint with the unchanged dense tensors and the ToMoE tensors.

Dense shards are hard-linked (copied across file systems), so the export needs little memory. Pruning happens
when a server loads the checkpoint, not on disk.
"""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from tomoe_training.artifacts.adapter import Adapter, LayerAdapter
from tomoe_training.artifacts.atomic import atomic_folder, link_or_copy
from tomoe_training.artifacts.model_card import model_card
from tomoe_training.artifacts.model_check import load_base_config, model_tensors
from tomoe_training.artifacts.provenance import provenance
from tomoe_training.artifacts.safetensors_io import (
    FILE_NAME,
    INDEX_NAME,
    StoredTensor,
    copy_tensors,
    fingerprint,
    read_header,
    write_tensors,
)
from tomoe_training.artifacts.tokenizer_files import copy_tokenizer
from tomoe_training.budget import Widths, choose_units, expert_masks, solve_widths
from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES, base_model_type, block_shape
from tomoe_vllm.hf.tomoe_math import BlockShape, head_units, pack_signature, top_mask

TOMOE_SHARD = "model-tomoe.safetensors"
SHIPPED_CODE = ("configuration_tomoe.py", "tomoe_math.py", "modeling_tomoe.py")
COPIED = (
    "generation_config.json", "*processor_config.json", "*LICEN[CS]E*", "*[Ll]icen[cs]e*", "NOTICE*", "*POLICY*",
    "COPYING*",
)  # fmt: skip
"""Beside the tokenizer. The base's licence and policy hold for the checkpoint, too."""


def check_base(adapter: Adapter, base: Path) -> None:
    """Raise ``ValueError`` unless ``base`` has exactly the tensors that the adapter was trained on."""
    expected = adapter.config.base_model_hash
    actual = fingerprint(base)
    if actual != expected:
        raise ValueError(
            f"the adapter was trained on {adapter.config.base_model_name} ({expected[:19]}...), but {base} has "
            f"{actual[:19]}...: it is another model, or a damaged copy"
        )


def plan_widths(
    adapter: Adapter, shape: BlockShape, active_ratio: float | None, width_multiple: int, head_dim_multiple: int
) -> Widths:
    """Widths of the exported model for ``active_ratio``; None is the adapter's own budget."""
    p = adapter.config.active_ratio if active_ratio is None else active_ratio
    if not 0 < p <= 1:
        raise ValueError(f"active_ratio is {p}; it must be in (0, 1]")
    for name, multiple in (("width_multiple", width_multiple), ("head_dim_multiple", head_dim_multiple)):
        if multiple < 1:
            raise ValueError(f"{name} is {multiple}; it must be at least 1")
    return solve_widths(
        [layer.logits for layer in adapter.layers],
        shape,
        p,
        width_multiple=width_multiple,
        head_dim_multiple=head_dim_multiple,
    )


def tomoe_tensors(layer: LayerAdapter, i: int, widths: Widths, shape: BlockShape) -> dict[str, Tensor]:
    """Checkpoint tensors of layer ``i``, with the names of the reference model."""
    head, expert = f"model.layers.{i}.self_attn.head_gate", f"model.layers.{i}.mlp.expert_gate"
    units = choose_units(layer.logits.query_key, widths.qk_dims[i], shape)
    tensors = {
        f"{head}.query_key_dims": units[head_units(shape.head_dim, shape.rotary_dim)].to(torch.uint8),
        f"{expert}.router.weight": layer.router,
        f"{expert}.signature": pack_signature(expert_masks(layer.logits.experts, widths.experts[i])),
    }
    if layer.value_down is not None:
        tensors |= {
            f"{head}.value_down.weight": layer.value_down,
            f"{head}.value_down.bias": layer.value_bias,
            f"{head}.value_norm.weight": layer.value_norm_weight,
            f"{head}.value_norm.bias": layer.value_norm_bias,
            f"{head}.value_up.weight": layer.value_up,
        }
    elif layer.logits.value is not None:
        tensors[f"{head}.value_dims"] = top_mask(layer.logits.value, widths.vo_dims[i]).to(torch.uint8)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def export_checkpoint(
    base: Path,
    adapter_folder: Path,
    out: Path,
    *,
    active_ratio: float | None = None,
    width_multiple: int = 32,
    head_dim_multiple: int = 8,
) -> Widths:
    """Write a checkpoint to ``out``, atomically. Returns its widths.

    Raises ``ValueError`` for a base that the adapter was not trained on, damaged files or an impossible budget.
    """
    config = load_base_config(base)
    dense = model_tensors(base, config, warns=True)
    adapter = Adapter.load(adapter_folder)
    shape = block_shape(config)
    check_base(adapter, base)
    widths = plan_widths(adapter, shape, active_ratio, width_multiple, head_dim_multiple)
    with atomic_folder(out) as folder:
        weight_map = write_dense(dense, folder)
        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(adapter.layers):
            tensors |= tomoe_tensors(layer, i, widths, shape)
        write_tensors(tensors, folder / TOMOE_SHARD)
        weight_map |= dict.fromkeys(tensors, TOMOE_SHARD)
        num_bytes = sum(t.num_bytes for t in dense.values()) + sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        model_tensors(folder, _write_config(config, adapter, widths, active_ratio, folder))
        copy_tokenizer(base, folder)
        for file in (file for pattern in COPIED for file in base.glob(pattern) if file.is_file()):
            shutil.copyfile(file, folder / file.name)
        for name in SHIPPED_CODE:
            (folder / name).write_text(files("tomoe_vllm.hf").joinpath(name).read_text())
        details = provenance() | {"training": adapter.config.training}
        (folder / "tomoe_provenance.json").write_text(json.dumps(details, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(adapter.config, widths, shape))
    return widths


def write_dense(dense: dict[str, StoredTensor], folder: Path) -> dict[str, str]:
    """Write the files of the dense tensors, given by their name in the model. Returns the file name of each.

    A file that holds just these tensors is linked, another one written anew without what does not belong to the model.
    """
    weight_map: dict[str, str] = {}
    for file in sorted({tensor.file for tensor in dense.values()}):
        wanted = {name: tensor for name, tensor in dense.items() if tensor.file == file}
        target = folder / _dense_name(file)
        if wanted == read_header(file):
            link_or_copy(file, target)
        else:
            copy_tensors(wanted, target)
        weight_map |= dict.fromkeys(wanted, target.name)
    return weight_map


def _dense_name(file: Path) -> str:
    """Name of a dense file in the checkpoint. (transformers ignores the index if there is a model.safetensors.)"""
    return "model-dense.safetensors" if file.name in (FILE_NAME, TOMOE_SHARD) else file.name


def _write_config(config, adapter: Adapter, widths: Widths, active_ratio: float | None, folder: Path):
    """Write and return the config of the checkpoint."""
    name = base_model_type(config)
    config_class = CONFIG_CLASSES[name]
    fields = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "transformers_weights"):
        fields.pop(key, None)
    model_class = config_class.__name__.replace("Config", "ForCausalLM")
    tomoe = config_class(
        **fields,
        num_experts=adapter.config.num_experts,
        expert_intermediate_sizes=widths.experts,
        qk_head_dims=widths.qk_dims,
        vo_head_dims=widths.vo_dims,
        vo_mode=adapter.config.vo_mode,
        active_ratio=adapter.config.active_ratio if active_ratio is None else active_ratio,
        value_router_dim=adapter.config.value_router_dim,
        base_model_hash=adapter.config.base_model_hash,
        architectures=[model_class],
        auto_map={
            "AutoConfig": f"configuration_tomoe.{config_class.__name__}",
            "AutoModelForCausalLM": f"modeling_tomoe.{model_class}",
        },
    )
    tomoe.save_pretrained(folder)
    return tomoe
