"""The ToMoE causal LM for vLLM: one decoder for all model families, configured by a table of their differences.

The decoder is assembled from vLLM's public layers and those of ``tomoe_vllm.layers``. Module names are those of the
Hugging Face reference model, with q, k, v and gate, up fused, so a table maps the weights. A family is one row of
:data:`DECODERS` and one row in ``hf/configuration_tomoe.py`` (docs/adding_a_family.md).

Two constraints of vLLM: no ``from __future__ import annotations``, because ``support_torch_compile`` reads annotations
as types; and the interface flags (LoRA, pipeline parallelism, quantization) must be declared in this file, because vLLM
caches its inspection of a model class by the hash of the file that defines the class.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from tomoe_vllm.hf.configuration_tomoe import base_model_type
from tomoe_vllm.layers.attention.attention import ToMoEAttention
from tomoe_vllm.layers.compile_key import add_to_compile_key
from tomoe_vllm.layers.mlp.layout import decide_layout, make_expert_mlp
from tomoe_vllm.layers.norm import ToMoELayerNorm, ToMoERMSNorm
from tomoe_vllm.layers.router_check import check_routers
from tomoe_vllm.models.loading import StrictLoader, require_readable


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Differences between families. A string is the name of a boolean config field; a bool is a constant."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    lm_head_bias: bool = False
    has_qk_norm: bool = False
    norm: type[nn.Module] = ToMoERMSNorm
    norm_eps: str = "rms_norm_eps"
    final_norm: str = "norm"
    is_parallel: bool = False  # attention and MLP read the same normed input and are summed (Phi)


DECODERS = {
    "llama": Decoder(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Decoder(),
    "qwen2": Decoder(qkv_bias=True),
    "qwen3": Decoder(qkv_bias="attention_bias", output_bias="attention_bias", has_qk_norm=True),
    "phi": Decoder(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        lm_head_bias=True,
        norm=ToMoELayerNorm,
        norm_eps="layer_norm_eps",
        final_norm="final_layernorm",
        is_parallel=True,
    ),
}
"""Keyed by the ``model_type`` of the dense family."""


def _is_set(config: PreTrainedConfig, value: bool | str) -> bool:
    return bool(getattr(config, value)) if isinstance(value, str) else value


def _make_norm(config: PreTrainedConfig, family: Decoder) -> nn.Module:
    return family.norm(config.hidden_size, eps=getattr(config, family.norm_eps))


class ToMoEDecoderLayer(nn.Module):
    """One decoder block. Its state is a pair of tensors whose sum is the residual stream, as in vLLM's own models."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, expert_layout: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        family, layer_idx = DECODERS[base_model_type(config)], extract_layer_index(prefix)
        self.self_attn = ToMoEAttention(
            config,
            layer_idx,
            qkv_bias=_is_set(config, family.qkv_bias),
            output_bias=_is_set(config, family.output_bias),
            has_qk_norm=family.has_qk_norm,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = make_expert_mlp(
            expert_layout,
            config,
            layer_idx,
            bias=_is_set(config, family.mlp_bias),
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = _make_norm(config, family)
        self.is_parallel = family.is_parallel
        if not self.is_parallel:
            self.post_attention_layernorm = _make_norm(config, family)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        attention = self.self_attn(positions, hidden_states)
        if self.is_parallel:
            return attention + self.mlp(hidden_states), residual
        hidden_states, residual = self.post_attention_layernorm(attention, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class ToMoEModel(nn.Module):
    """Embeddings, decoder blocks and final norm: the part that torch.compile traces."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        family, pp = DECODERS[base_model_type(config)], get_pp_group()
        self.embed_tokens: nn.Module = PPMissingLayer()
        if pp.is_first_rank or (config.tie_word_embeddings and pp.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
        expert_layout = decide_layout(config, vllm_config.quant_config)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: ToMoEDecoderLayer(vllm_config, prefix, expert_layout),
            prefix=f"{prefix}.layers",
        )
        self.final_norm = family.final_norm
        self.add_module(self.final_norm, _make_norm(config, family) if pp.is_last_rank else PPMissingLayer())
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        add_to_compile_key(vllm_config, expert_layout)

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        residual: torch.Tensor | None = None
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = getattr(self, self.final_norm)(hidden_states, residual)
        return hidden_states


class ToMoEForCausalLM(nn.Module, SupportsLoRA, SupportsPP, SupportsQuant):
    """All ToMoE architectures: ``ToMoELlamaForCausalLM``, ``ToMoEPhiForCausalLM`` and so on.

    Raises ``ValueError`` for an unsupported family, head size, activation, layout or parallel size.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if vllm_config.parallel_config.enable_expert_parallel:
            raise ValueError(
                "--enable-expert-parallel does not apply: the experts of ToMoE share one dense matrix. "
                "Use --tensor-parallel-size alone"
            )
        require_readable(vllm_config.load_config.load_format)
        if current_platform.is_cuda() and os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
            raise ValueError(
                "VLLM_BATCH_INVARIANT is set, but ToMoE's GPU kernels choose their tiles by the number of tokens, so "
                "output depends on the batch. Unset it"
            )
        self.config = config
        self.model = ToMoEModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                bias=DECODERS[base_model_type(config)].lm_head_bias,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        layers = self.model.layers[self.model.start_layer : self.model.end_layer]
        self.loader = StrictLoader(
            self,
            mapper=self.hf_to_vllm_mapper,
            packed_modules=self.packed_modules_mapping,
            is_tied=config.tie_word_embeddings,
            is_quantized=self.quant_config is not None,
            load_format=vllm_config.load_config.load_format,
            why_not_reloadable=layers[0].mlp.why_not_reloadable,
        )
        layers[-1].self_attn.attn.after_loading = self.finish_loading

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if self.loader.failure is not None:
            raise RuntimeError(f"{self.loader.failure}. Reload all weights, or restart the engine")
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load every tensor of the checkpoint exactly once. Raises ``ValueError`` naming tensors that do not fit."""
        return self.loader.load(weights)

    def process_weights_after_loading(self) -> None:
        """Called by vLLM after the first load only."""
        check_routers(self)

    def finish_loading(self) -> None:
        """Derive masks, lists and the order of neurons. Called whenever weights were loaded (``compat/reload.py``)."""
        is_reloaded = self.loader.finish()
        try:
            for layer in self.model.layers[self.model.start_layer : self.model.end_layer]:
                layer.self_attn.finish_loading()
                layer.mlp.finish_loading()
        except Exception as error:  # some layers have new masks, others old ones
            self.loader.failure = f"reloading the weights failed ({error})"
            raise
        if is_reloaded and isinstance(self.lm_head, ParallelLMHead):
            embeddings = self.model.embed_tokens
            if isinstance(embeddings, VocabParallelEmbedding) and self.lm_head.weight is embeddings.weight:
                # vLLM processes tied weights in the embeddings only, and on a CPU the head has a packed copy.
                self.lm_head.quant_method.process_weights_after_loading(self.lm_head)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises ``ValueError``: vLLM saves a state only for load formats that cannot restore this model."""
        raise ValueError(
            "a sharded state of a ToMoE engine cannot be loaded again: its parameters are pruned and lack the masks. "
            "Copy the exported checkpoint instead"
        )
