"""Sizes of the layers that ``tomoe doctor`` checks: those of a model, of well-known models, or tiny ones."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from tomoe_vllm.diagnostics.roofline import LLAMA_2_7B, MLPShape
from tomoe_vllm.hf.configuration_tomoe import FAMILIES
from tomoe_vllm.kernels.expert_activation import require_activation

PATHS = ("gather", "dense", "grouped")
"""Execution paths of the expert MLP on a GPU."""
MAX_GATHER_TOKENS = 8
"""gather reads the rows of each token: for thousands it would take seconds, and ``tune`` never chooses it there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateShape:
    """Sizes of the gates of one layer on one rank. ``width``: value dims that a token keeps; ``rank``: R."""

    hidden_size: int
    num_heads: int
    head_dim: int
    width: int
    num_experts: int = 8
    rank: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSizes:
    """One layer on one tensor-parallel rank. ``activation``: a Hugging Face ``hidden_act``."""

    name: str
    mlp: MLPShape
    gates: GateShape
    activation: str = "silu"
    has_bias: bool = False

    def share(self, num_ranks: int) -> "LayerSizes | None":
        """The part of one of ``num_ranks`` ranks: neurons and heads are split. None if the sizes do not divide."""
        mlp, heads = self.mlp, self.gates.num_heads
        if num_ranks == 1:
            return self
        if mlp.num_neurons % num_ranks or mlp.width % num_ranks or heads % num_ranks:
            return None
        return replace(
            self,
            name=f"{self.name}, TP {num_ranks}",
            mlp=replace(mlp, num_neurons=mlp.num_neurons // num_ranks, width=mlp.width // num_ranks),
            gates=replace(self.gates, num_heads=heads // num_ranks),
        )


LLAMA = LayerSizes(
    name="LLaMA-2 7B",
    mlp=replace(LLAMA_2_7B, num_layers=1),
    gates=GateShape(hidden_size=4096, num_heads=32, head_dim=128, width=64),
)
PHI = LayerSizes(
    name="Phi-2",
    mlp=MLPShape(hidden_size=2560, num_neurons=10240, width=5120, num_matrices=2),
    gates=GateShape(hidden_size=2560, num_heads=32, head_dim=80, width=40),
    activation="gelu_new",
    has_bias=True,
)
TINY = LayerSizes(
    name="tiny",
    mlp=MLPShape(hidden_size=40, num_neurons=56, width=28),
    gates=GateShape(hidden_size=40, num_heads=2, head_dim=24, width=9, rank=16),
)
"""For the interpreter, which takes about a millisecond per tile. No size is a multiple of a block."""
TINY_PHI = LayerSizes(
    name="tiny without gate",
    mlp=MLPShape(hidden_size=40, num_neurons=56, width=28, num_matrices=2),
    gates=GateShape(hidden_size=40, num_heads=2, head_dim=20, width=10, rank=16),
    activation="gelu_new",
    has_bias=True,
)


def layer_of(folder: Path) -> LayerSizes:
    """The layer of a dense model or checkpoint, from its config.json.

    A dense model gets 8 experts of half the neurons, and half of the value dims. Raises ``ValueError`` for an
    unsupported family or activation, and ``OSError`` if there is no config.json.
    """
    config = json.loads((folder / "config.json").read_text())
    family = str(config.get("model_type", "")).removeprefix("tomoe_")
    if family not in FAMILIES:
        raise ValueError(f"{folder} is a {family or 'nameless'!r} model; supported families: {', '.join(FAMILIES)}")
    hidden_size, num_neurons = config["hidden_size"], config["intermediate_size"]
    num_heads, num_experts = config["num_attention_heads"], config.get("num_experts") or 8
    head_dim = config.get("head_dim") or hidden_size // num_heads
    masked = [width for width in config.get("vo_head_dims") or [] if width < head_dim]
    activation = config.get("hidden_act", "silu")
    require_activation(activation)
    return LayerSizes(
        name=folder.name,
        mlp=MLPShape(
            hidden_size=hidden_size,
            num_neurons=num_neurons,
            width=max(config.get("expert_intermediate_sizes") or [num_neurons // 2]),
            num_experts=num_experts,
            num_matrices=FAMILIES[family].num_mlp_matrices,
        ),
        gates=GateShape(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            width=max(masked, default=head_dim // 2),
            num_experts=num_experts,
            rank=config.get("value_router_dim") or 128,
        ),
        activation=activation,
        has_bias=family == "phi" or bool(config.get("mlp_bias")),
    )
