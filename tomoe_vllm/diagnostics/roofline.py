"""Roofline model of one MLP step: bytes / bandwidth or FLOPs / peak, whichever takes longer.

Only the bytes of the weights are counted. They dominate small steps; activations, launches and routers come on top.
Routing is assumed to be uniform, and experts to be independent random subsets with a share p of the neurons. Experts
that overlap more have a smaller union, which makes ToMoE cheaper (docs/performance.md).

Symbols: M tokens, N experts, p = neurons of an expert / neurons, k distinct experts touched, P bytes of the
dense MLP weights.
"""

from dataclasses import dataclass

L2_SPEEDUP = 2.2
"""L2 bandwidth over memory bandwidth. An assumption, not a measurement. Rows shared by experts are read once from
memory, but once per expert from L2."""

WORTH_IT = 0.97
"""Least acceptable speed relative to the dense model: ``auto`` chooses nothing that is slower for a reachable step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """Peak rates of a device: memory bandwidth in bytes/s, dense bf16 FLOP/s."""

    name: str
    bandwidth: float
    flops: float


CHIPS = (
    Chip(name="A100", bandwidth=2.039e12, flops=312e12),  # 80 GB SXM
    Chip(name="H100", bandwidth=3.35e12, flops=989e12),  # SXM
    Chip(name="H200", bandwidth=4.8e12, flops=989e12),  # SXM
)
"""From the manufacturers' data sheets."""
_NAMES = {"A100-SXM4-80GB": "A100", "H100 80GB HBM3": "H100", "H200": "H200"}
"""Torch's names after "NVIDIA ". Others that begin or end alike (PCIe, 40 GB, NVL, GH200, MIG) have other rates."""


def chip_named(device_name: str) -> Chip | None:
    """The chip of torch's ``device_name``, or None for one that is not in :data:`CHIPS`, as a MIG slice is."""
    name = _NAMES.get(device_name.removeprefix("NVIDIA "))
    return next((chip for chip in CHIPS if chip.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPShape:
    """Sizes of ``num_layers`` equal MLP layers. ``width``: neurons of an expert. ``itemsize``: bytes per weight."""

    hidden_size: int
    num_neurons: int
    width: int
    num_experts: int = 8
    num_matrices: int = 3  # 2 without a gate
    num_layers: int = 1
    itemsize: float = 2

    @property
    def active_ratio(self) -> float:
        """p = width / num_neurons."""
        return self.width / self.num_neurons

    @property
    def weight_bytes(self) -> float:
        """P, bytes of the dense weights."""
        return self.itemsize * self.flops_per_token / 2

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the dense MLP for one token."""
        return 2 * self.num_matrices * self.hidden_size * self.num_neurons * self.num_layers


LLAMA_2_7B = MLPShape(hidden_size=4096, num_neurons=11008, width=5504, num_layers=32)


def distinct_experts(num_tokens: int, num_experts: int) -> list[float]:
    """Probabilities that ``num_tokens`` uniformly routed tokens use k distinct experts, for k = 0 .. N."""
    chances = [1.0] + [0.0] * num_experts
    for _ in range(num_tokens):
        chances = [
            chances[k] * k / num_experts + (chances[k - 1] * (num_experts - k + 1) / num_experts if k else 0.0)
            for k in range(num_experts + 1)
        ]
    return chances


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Bytes read from memory, bytes read from L2 (0: no more than from memory), and FLOPs."""

    memory_bytes: float
    cache_bytes: float
    flops: float

    def seconds(self, chip: Chip) -> float:
        """Lower bound of the time on ``chip``."""
        return max(
            self.memory_bytes / chip.bandwidth,
            self.cache_bytes / (L2_SPEEDUP * chip.bandwidth),
            self.flops / chip.flops,
        )


def costs(shape: MLPShape, num_tokens: int) -> dict[str, Cost]:
    """Cost of a step on each execution path.

    dense         P bytes; the dense MLP and the ``dense`` path of the shared layout
    materialised  k p P: a matrix for each expert (the fused layout)
    gather        the union of the used experts from memory, and M p P from L2: one expert per token
    grouped       the union of the used experts from memory, and k p P from L2

    It is the union because tokens or experts process the sorted rows of one matrix at the same time. gather does not
    use tensor cores: the real peak of its FLOPs is lower than assumed here, which does not matter for few tokens.
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
        "grouped": cost(union_bytes, p * dense_flops, experts_bytes),
    }
