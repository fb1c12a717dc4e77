"""What one MLP step costs at least: bytes over bandwidth or FLOPs over peak, whichever is longer.

Only the weights' bytes are counted: they are all of a small step, and activations, launches and the routers
come on top. Routing is taken as uniform and experts as independent subsets of a share p of the neurons; more
overlap makes the union smaller and ToMoE cheaper (docs/performance.md).

Symbols: M tokens, N experts, p = neurons of an expert / neurons, k distinct experts touched, P bytes of the
dense MLP weights.
"""

from dataclasses import dataclass

L2_SPEEDUP = 2.2
"""L2 bandwidth over memory bandwidth. Assumed, not measured: where experts share rows through L2, each still
reads its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """Peak numbers of a device: bytes/s, dense bf16 FLOP/s."""

    name: str
    bandwidth: float
    flops: float


CHIPS = (
    Chip(name="A100", bandwidth=2.039e12, flops=312e12),  # 80 GB SXM
    Chip(name="H100", bandwidth=3.35e12, flops=989e12),  # SXM
)
"""From the makers' data sheets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPShape:
    """One MLP layer, times ``num_layers``. ``width``: neurons of an expert; 2 bytes a weight by default."""

    hidden_size: int
    num_neurons: int
    width: int
    num_experts: int = 8
    num_matrices: int = 3  # 2 without a gate
    num_layers: int = 1
    itemsize: int = 2

    @property
    def active_ratio(self) -> float:
        """p."""
        return self.width / self.num_neurons

    @property
    def weight_bytes(self) -> int:
        """P, the dense weights."""
        return self.itemsize * self.num_matrices * self.hidden_size * self.num_neurons * self.num_layers

    @property
    def flops_per_token(self) -> int:
        """Of the dense MLP."""
        return 2 * self.weight_bytes // self.itemsize


LLAMA_2_7B = MLPShape(hidden_size=4096, num_neurons=11008, width=5504, num_layers=32)


def distinct_experts(num_tokens: int, num_experts: int) -> list[float]:
    """Probability that tokens routed uniformly touch k experts, k = 0 .. N."""
    chances = [1.0] + [0.0] * num_experts
    for _ in range(num_tokens):
        chances = [
            chances[k] * k / num_experts + (chances[k - 1] * (num_experts - k + 1) / num_experts if k else 0.0)
            for k in range(num_experts + 1)
        ]
    return chances


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Bytes from memory, bytes through L2 where those are more, and FLOPs."""

    memory_bytes: float
    cache_bytes: float
    flops: float

    def seconds(self, chip: Chip) -> float:
        """At least."""
        return max(
            self.memory_bytes / chip.bandwidth,
            self.cache_bytes / (L2_SPEEDUP * chip.bandwidth),
            self.flops / chip.flops,
        )


def costs(shape: MLPShape, num_tokens: int) -> dict[str, Cost]:
    """Cost of a step by each way through the layer.

    dense         P bytes
    materialised  a copy of each expert: k p P
    gather        the union of the experts touched from memory, M p P through L2: one expert per token
    masked        P, as dense
    grouped       the union of the experts touched from memory, k p P through L2

    The union, because tokens or experts run side by side over the sorted rows of one matrix. gather
    multiplies on the plain cores: its FLOPs have a lower peak than counted, which a few tokens do not reach.
    """
    p, dense_bytes = shape.active_ratio, shape.weight_bytes
    chances = distinct_experts(num_tokens, shape.num_experts)
    experts_bytes = dense_bytes * p * sum(k * chance for k, chance in enumerate(chances))
    union_bytes = dense_bytes * sum((1 - (1 - p) ** k) * chance for k, chance in enumerate(chances))
    dense_flops = num_tokens * shape.flops_per_token

    def cost(memory_bytes: float, flops: float, cache_bytes: float = 0.0) -> Cost:
        return Cost(memory_bytes=memory_bytes, cache_bytes=cache_bytes, flops=flops)

    return {
        "dense": cost(dense_bytes, dense_flops),
        "materialised": cost(experts_bytes, p * dense_flops),
        "gather": cost(union_bytes, p * dense_flops, num_tokens * p * dense_bytes),
        "masked": cost(dense_bytes, dense_flops),
        "grouped": cost(union_bytes, p * dense_flops, experts_bytes),
    }
