"""Model shapes that can be measured: LLaMA-like, with random weights."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a dense model, and of ToMoE made from it: 8 experts at p = 0.5."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = 32_000
    num_experts: int = 8

    @property
    def expert_width(self) -> int:
        """Neurons of an expert at p = 0.5."""
        return self.intermediate_size // 2

    @property
    def mlp_bytes(self) -> int:
        """Bytes of the dense MLP of one layer in float32."""
        return 3 * 4 * self.hidden_size * self.intermediate_size


SHAPES = {
    "135m": Shape(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49_152,
    ),
    "1b": Shape(hidden_size=2048, intermediate_size=5632, num_layers=22, num_heads=32, num_kv_heads=4, head_dim=64),
    "7b": Shape(hidden_size=4096, intermediate_size=11_008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128),
}
SHAPES["7b-layer"] = replace(SHAPES["7b"], num_layers=1)
"""SmolLM2-135M, TinyLlama-1.1B, LLaMA-2-7B (13 GB), and one layer of it."""


def shape_of(name: str) -> Shape:
    """The shape called ``name``. Raises ``ValueError`` with the known names if there is none."""
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}; it must be one of {', '.join(SHAPES)}")
    return SHAPES[name]
