"""The adapter: the result of training. With the base model it is all that the export needs.

It is a folder like a LoRA adapter: ``adapter_config.json`` and ``adapter.safetensors``. It holds mask *logits*,
not masks, so that one training run can be exported at other budgets and hardware multiples.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tomoe_training.artifacts.atomic import write_json
from tomoe_training.artifacts.safetensors_io import write_tensors
from tomoe_training.budget import LayerLogits
from tomoe_vllm.hf.configuration_tomoe import FAMILIES

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter.safetensors"
FORMAT_VERSION = 1


@dataclass(kw_only=True)
class AdapterConfig:
    """Content of ``adapter_config.json``. ``training`` is the resolved run config and its provenance."""

    base_model_name: str
    base_model_hash: str
    base_model_type: str
    num_layers: int
    num_experts: int
    value_router_dim: int
    vo_mode: str
    active_ratio: float
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(kw_only=True)
class LayerAdapter:
    """Trained tensors of one layer. Routers are in their form for inference (appendix A.1)."""

    logits: LayerLogits
    router: Tensor  # [N, D]
    value_down: Tensor | None = None  # [R, D]; these five are None unless vo_mode is dynamic
    value_bias: Tensor | None = None  # [R], the mean expert embedding
    value_norm_weight: Tensor | None = None  # [R]
    value_norm_bias: Tensor | None = None  # [R]
    value_up: Tensor | None = None  # [A, R]


# Field of LayerAdapter or LayerLogits -> tensor name in the file.
_LOGITS = {"experts": "expert_logits", "query_key": "query_key_logits", "value": "value_logits"}
_ROUTERS = {
    "router": "router.weight",
    "value_down": "value_down.weight",
    "value_bias": "value_down.bias",
    "value_norm_weight": "value_norm.weight",
    "value_norm_bias": "value_norm.bias",
    "value_up": "value_up.weight",
}


@dataclass(kw_only=True)
class Adapter:
    """Config and tensors of an adapter, float32 in memory."""

    config: AdapterConfig
    layers: list[LayerAdapter]

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write both files atomically, the config last. ``dtype`` is the stored dtype."""
        tensors = {
            f"layers.{i}.{name}": tensor.to(dtype).contiguous().cpu()
            for i, layer in enumerate(self.layers)
            for name, tensor in _named_tensors(layer)
        }
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{ADAPTER_TENSORS}.tmp-{os.getpid()}"
        write_tensors(tensors, temporary)
        temporary.replace(folder / ADAPTER_TENSORS)
        write_json(folder / ADAPTER_CONFIG, asdict(self.config))

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Read an adapter. Raises ``FileNotFoundError``, or ``ValueError`` for a damaged or unsupported one."""
        config_file = folder / ADAPTER_CONFIG
        if not config_file.is_file():
            raise FileNotFoundError(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}")
        try:
            fields = json.loads(config_file.read_text())
            if "peft_type" in fields:
                raise ValueError(
                    f"{folder} is a PEFT adapter, not one of tomoe train; merge it into its model: that is a --base"
                )
            config = AdapterConfig(**fields)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{config_file} is damaged: {error}") from error
        if config.format_version != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has adapter format {config.format_version}, this version reads {FORMAT_VERSION}"
            )
        if config.base_model_type not in FAMILIES:
            raise ValueError(f"{folder} is for {config.base_model_type!r}; supported: {', '.join(sorted(FAMILIES))}")
        try:
            tensors = {name: t.float() for name, t in load_file(folder / ADAPTER_TENSORS).items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / ADAPTER_TENSORS} cannot be read: {error}") from error
        return cls(config=config, layers=[_layer(config, tensors, i, folder) for i in range(config.num_layers)])


def _named_tensors(layer: LayerAdapter):
    for source, names in ((layer.logits, _LOGITS), (layer, _ROUTERS)):
        for attribute, name in names.items():
            if (tensor := getattr(source, attribute)) is not None:
                yield name, tensor


def _layer(config: AdapterConfig, tensors: dict[str, Tensor], i: int, folder: Path) -> LayerAdapter:
    def get(name: str, is_needed: bool) -> Tensor | None:
        key = f"layers.{i}.{name}"
        if is_needed and key not in tensors:
            raise ValueError(f"{folder} lacks the tensor {key}: train or download the adapter again")
        return tensors.get(key)

    is_dynamic = config.vo_mode == "dynamic"
    logits = {a: get(name, a != "value" or config.vo_mode != "none") for a, name in _LOGITS.items()}
    routers = {a: get(name, a == "router" or is_dynamic) for a, name in _ROUTERS.items()}
    return LayerAdapter(logits=LayerLogits(**logits), **routers)  # type: ignore[arg-type]
