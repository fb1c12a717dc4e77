"""The reference model: the Hugging Face class of the base family with gates on its linears.

No forward pass is rewritten. Each mask of the method is applied to the input or output of a linear that every
family has:

    Q/K   output of q_proj and k_proj (a RoPE pair shares its mask, so before and after RoPE are equivalent)
    V/O   input of o_proj, by the mask of the query token (eq. 4 read literally)
    MLP   input of down_proj, by the mask of the token's expert (the pseudo-MoE of appendix B.3)

With the gates off it is the dense model (the teacher), with the gates on the converted model. The result is
exact, but nothing is saved: dense GEMMs run and their outputs are masked. The fast implementation is in
tomoe_vllm/layers. The gates for training (training/tomoe_training/method/gates.py) are subclasses of the two
gates here and differ only in how they compute the masks.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PhiForCausalLM, PreTrainedModel
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

from .configuration_tomoe import CONFIG_CLASSES, Family, block_shape, family_of
from .configuration_tomoe import ToMoELlamaConfig, ToMoEMistralConfig, ToMoEPhiConfig, ToMoEQwen2Config
from .configuration_tomoe import ToMoEQwen3Config
from .tomoe_math import mask_heads, route, top_mask, unpack_signature, value_logits


class HeadGate(nn.Module):
    """Masks head dims of one attention layer. Subclasses define the masks."""

    is_on = True
    _handles: tuple = ()

    def query_key_mask(self) -> Tensor | None:
        """[A], the same for all tokens and heads; None masks nothing."""
        raise NotImplementedError

    def value_mask(self, hidden_states: Tensor) -> Tensor | None:
        """[T, A] or [A] for tokens [T, D]; None masks nothing."""
        raise NotImplementedError

    def attach(self, layer: nn.Module, family: Family) -> None:
        """Attach the gate to one decoder layer; call it again after linears were replaced (PEFT wraps them)."""
        for handle in self._handles:
            handle.remove()
        self._handles = (
            layer.get_submodule(family.attention_in).register_forward_pre_hook(self._read),
            layer.get_submodule(family.query).register_forward_hook(self._mask_query_key),
            layer.get_submodule(family.key).register_forward_hook(self._mask_query_key),
            layer.get_submodule(family.attention_out).register_forward_pre_hook(self._mask_value),
        )

    def _read(self, module, args):
        if self.is_on:
            self._value_mask = self.value_mask(args[0])

    def _mask_query_key(self, module, args, output):
        if self.is_on and (mask := self.query_key_mask()) is not None:
            return mask_heads(output, mask.to(output.dtype))

    def _mask_value(self, module, args):
        if self.is_on and self._value_mask is not None:
            return (mask_heads(args[0], self._value_mask.to(args[0].dtype)), *args[1:])


class ExpertGate(nn.Module):
    """Masks the neurons of one MLP that a token's expert drops. Subclasses define the masks."""

    is_on = True
    _handles: tuple = ()

    def neuron_mask(self, hidden_states: Tensor) -> Tensor:
        """[T, F] for tokens [T, D]."""
        raise NotImplementedError

    def attach(self, layer: nn.Module, family: Family) -> None:
        """Attach the gate to one decoder layer; call it again after linears were replaced (PEFT wraps them)."""
        for handle in self._handles:
            handle.remove()
        self._handles = (
            layer.get_submodule(family.mlp_in).register_forward_pre_hook(self._read),
            layer.get_submodule(family.mlp_out).register_forward_pre_hook(self._mask_neurons),
        )

    def _read(self, module, args):
        if self.is_on:
            self._neuron_mask = self.neuron_mask(args[0])

    def _mask_neurons(self, module, args):
        if self.is_on:
            return (args[0] * self._neuron_mask.to(args[0].dtype), *args[1:])


class ToMoEHeadGate(HeadGate):
    """Head gate of a checkpoint: kept Q/K dims, and a router that selects each token's V/O dims."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        shape, rank = block_shape(config), config.value_router_dim
        self.vo_mode, self.top_k = config.vo_mode, config.vo_head_dims[layer_idx]
        self.register_buffer("query_key_dims", torch.ones(shape.head_dim, dtype=torch.uint8))
        if self.vo_mode == "static":
            self.register_buffer("value_dims", torch.ones(shape.head_dim, dtype=torch.uint8))
        elif self.vo_mode == "dynamic":
            self.value_down = nn.Linear(shape.hidden_size, rank, dtype=torch.float32)
            self.value_norm = nn.LayerNorm(rank, dtype=torch.float32)
            self.value_up = nn.Linear(rank, shape.head_dim, bias=False, dtype=torch.float32)

    def query_key_mask(self) -> Tensor:
        return self.query_key_dims

    def value_mask(self, hidden_states: Tensor) -> Tensor | None:
        if self.vo_mode == "none":
            return None
        if self.vo_mode == "static":
            return self.value_dims
        down, norm, up = self.value_down, self.value_norm, self.value_up
        logits = value_logits(hidden_states, down.weight, down.bias, norm.weight, norm.bias, up.weight)
        return top_mask(logits, self.top_k)


class ToMoEExpertGate(ExpertGate):
    """Expert gate of a checkpoint: a router, and the membership bits of every neuron."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        shape = block_shape(config)
        self.num_experts = config.num_experts
        self.router = nn.Linear(shape.hidden_size, config.num_experts, bias=False, dtype=torch.float32)
        signature_bytes = -(-config.num_experts // 8)
        self.register_buffer("signature", torch.zeros(shape.intermediate_size, signature_bytes, dtype=torch.uint8))

    def neuron_mask(self, hidden_states: Tensor) -> Tensor:
        experts = route(nn.functional.linear(hidden_states.float(), self.router.weight.float()))
        return unpack_signature(self.signature, self.num_experts)[experts]


class ToMoEModelMixin(PreTrainedModel):
    """Adds gates to a causal LM of a base family: ``layer.self_attn.head_gate`` and ``layer.mlp.expert_gate``."""

    # Only the routers: with the names of the gates, their uint8 masks would be loaded as float32 too.
    _keep_in_fp32_modules_strict = [
        "head_gate.value_down", "head_gate.value_norm", "head_gate.value_up", "expert_gate.router",
    ]  # fmt: skip

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.model.layers):
            layer.self_attn.head_gate = ToMoEHeadGate(config, layer_idx)
            layer.mlp.expert_gate = ToMoEExpertGate(config, layer_idx)
        self.attach_gates()

    def attach_gates(self) -> None:
        """Attach the gates to the family's linears; call it again after these were replaced."""
        family = family_of(self.config)
        for layer in self.model.layers:
            layer.self_attn.head_gate.attach(layer, family)
            layer.mlp.expert_gate.attach(layer, family)

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Called by inference engines that would run the model by their generic transformers backend.

        Raises ``ImportError``: an engine without the ToMoE plugin must not ignore the gates silently.
        """
        raise ImportError(
            "This is a ToMoE checkpoint and this vLLM has no ToMoE plugin. Install tomoe-vllm from its checkout or "
            "wheel (pip install ./tomoe-vllm) and, if VLLM_PLUGINS is set, add `tomoe` to it."
        )

    @classmethod
    def from_pretrained(cls, folder, *args, output_loading_info=False, **kwargs):
        """As for any model, but missing gates raise ``ValueError``: transformers would initialize them."""
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        missing = sorted(name for name in info["missing_keys"] if "_gate." in name)
        if missing:
            raise ValueError(
                f"{folder} lacks the tensor {missing[0]} ({len(missing)} ToMoE tensors in all): export it again"
            )
        return (model, info) if output_loading_info else model

    def set_gates(self, is_on: bool) -> None:
        """Switch between the converted model (True) and the dense model (False)."""
        for module in self.modules():
            if isinstance(module, (HeadGate, ExpertGate)):
                module.is_on = is_on


class ToMoELlamaForCausalLM(ToMoEModelMixin, LlamaForCausalLM):
    config_class = ToMoELlamaConfig


class ToMoEMistralForCausalLM(ToMoEModelMixin, MistralForCausalLM):
    config_class = ToMoEMistralConfig


class ToMoEQwen2ForCausalLM(ToMoEModelMixin, Qwen2ForCausalLM):
    config_class = ToMoEQwen2Config


class ToMoEQwen3ForCausalLM(ToMoEModelMixin, Qwen3ForCausalLM):
    config_class = ToMoEQwen3Config


class ToMoEPhiForCausalLM(ToMoEModelMixin, PhiForCausalLM):
    config_class = ToMoEPhiConfig


MODEL_CLASSES = {
    "llama": ToMoELlamaForCausalLM,
    "mistral": ToMoEMistralForCausalLM,
    "qwen2": ToMoEQwen2ForCausalLM,
    "qwen3": ToMoEQwen3ForCausalLM,
    "phi": ToMoEPhiForCausalLM,
}
assert MODEL_CLASSES.keys() == CONFIG_CLASSES.keys()
