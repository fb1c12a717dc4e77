"""Config of a ToMoE checkpoint: the config of the base family plus widths, kept dims and budget.

A family is one entry of :data:`FAMILIES` (the positions of the gates), one config class here and one model
class in ``modeling_tomoe.py``. See docs/adding_a_family.md.
"""

from dataclasses import dataclass

from transformers import LlamaConfig, MistralConfig, PhiConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from .tomoe_math import BlockShape

VO_MODES = ("dynamic", "static", "none")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Positions of the gates in one architecture: module names inside a decoder layer."""

    attention_in: str = "self_attn.q_proj"  # its input is the input of the value router
    query: str = "self_attn.q_proj"  # its output is masked: the projection, or the norm after it
    key: str = "self_attn.k_proj"
    attention_out: str = "self_attn.o_proj"  # its input is masked by the value mask of the query token
    mlp_in: str = "mlp.gate_proj"  # its input is the input of the expert router
    mlp_out: str = "mlp.down_proj"  # its input is masked by the mask of the token's expert
    num_mlp_matrices: int = 3


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(query="self_attn.q_norm", key="self_attn.k_norm"),
    "phi": Family(attention_out="self_attn.dense", mlp_in="mlp.fc1", mlp_out="mlp.fc2", num_mlp_matrices=2),
}
"""Supported families by the ``model_type`` of the dense model."""


def base_model_type(config: PreTrainedConfig) -> str:
    """``model_type`` of the dense family of a dense or ToMoE config.

    Raises ``ValueError`` for an unsupported family or variant.
    """
    model_type = config.model_type.removeprefix("tomoe_")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} is not a supported family; supported: {', '.join(sorted(FAMILIES))}"
        )
    if getattr(config, "qk_layernorm", False):
        raise ValueError("Phi models with qk_layernorm=True are not supported; phi-2 itself has none")
    if getattr(config, "use_sliding_window", False):
        raise ValueError("sliding-window attention (use_sliding_window=true) is not supported")
    return model_type


def family_of(config: PreTrainedConfig) -> Family:
    """Gate positions for a dense or ToMoE config."""
    return FAMILIES[base_model_type(config)]


def block_shape(config: PreTrainedConfig) -> BlockShape:
    """Sizes of one decoder block of a dense or ToMoE config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return BlockShape(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        intermediate_size=config.intermediate_size,
        num_mlp_matrices=family_of(config).num_mlp_matrices,
    )


class ToMoEConfigMixin(PreTrainedConfig):
    """Adds the ToMoE fields to the config of a base family. (transformers makes every config a dataclass.)

    Raises ``ValueError`` for widths that do not fit the base model.
    """

    num_experts: int = 8
    """N, experts per MLP."""
    num_experts_per_tok: int = 1
    """Always 1: top-1 routing with gate value 1."""
    expert_intermediate_sizes: list[int] | None = None
    """Number of neurons that every expert of layer l keeps; None keeps all."""
    qk_head_dims: list[int] | None = None
    """Number of Q/K dims that every head of layer l keeps (a RoPE pair counts as 2); None keeps all."""
    vo_head_dims: list[int] | None = None
    """Number of V/O dims that a token uses in layer l: K of the top-K, or the static width; None keeps all."""
    vo_mode: str = "dynamic"
    """``dynamic`` (top-K per token), ``static`` (one mask for all tokens) or ``none``."""
    active_ratio: float = 1.0
    """Budget p: upper bound of active block parameters / all block parameters."""
    value_router_dim: int = 128
    """R, bottleneck size of the value router (d_e in the paper)."""
    base_model_hash: str = ""
    """Fingerprint of the dense tensors that the gates were trained on (safetensors_io.py in tomoe_training)."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        shape, num_layers = block_shape(self), self.num_hidden_layers
        self.expert_intermediate_sizes = self.expert_intermediate_sizes or [shape.intermediate_size] * num_layers
        self.qk_head_dims = self.qk_head_dims or [shape.head_dim] * num_layers
        self.vo_head_dims = self.vo_head_dims or [shape.head_dim] * num_layers
        self._validate_tomoe(shape)

    def _validate_tomoe(self, shape: BlockShape) -> None:
        if self.vo_mode not in VO_MODES:
            raise ValueError(f"vo_mode is {self.vo_mode!r}; it must be one of {', '.join(VO_MODES)}")
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}; it must be at least 1")
        limits = {
            "expert_intermediate_sizes": shape.intermediate_size,
            "qk_head_dims": shape.head_dim,
            "vo_head_dims": shape.head_dim,
        }
        for field, limit in limits.items():
            widths: list[int] = getattr(self, field)
            if len(widths) != self.num_hidden_layers:
                raise ValueError(f"{field} has {len(widths)} entries; the model has {self.num_hidden_layers} layers")
            for layer, width in enumerate(widths):
                if not 0 < width <= limit:
                    raise ValueError(f"{field}[{layer}] is {width}; it must be between 1 and {limit}")
        if shape.rotary_dim == shape.head_dim:
            for layer, dims in enumerate(self.qk_head_dims or []):
                if dims % 2:
                    raise ValueError(
                        f"qk_head_dims[{layer}] is {dims}; kept Q/K dims come in RoPE pairs, so it must be even. "
                        "Re-export with --head-dim-multiple 2"
                    )


class ToMoELlamaConfig(ToMoEConfigMixin, LlamaConfig):
    model_type = "tomoe_llama"


class ToMoEMistralConfig(ToMoEConfigMixin, MistralConfig):
    model_type = "tomoe_mistral"


class ToMoEQwen2Config(ToMoEConfigMixin, Qwen2Config):
    model_type = "tomoe_qwen2"


class ToMoEQwen3Config(ToMoEConfigMixin, Qwen3Config):
    model_type = "tomoe_qwen3"


class ToMoEPhiConfig(ToMoEConfigMixin, PhiConfig):
    model_type = "tomoe_phi"


CONFIG_CLASSES = {
    "llama": ToMoELlamaConfig,
    "mistral": ToMoEMistralConfig,
    "qwen2": ToMoEQwen2Config,
    "qwen3": ToMoEQwen3Config,
    "phi": ToMoEPhiConfig,
}
