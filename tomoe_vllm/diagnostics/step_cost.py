"""Cost model of a whole step on a GPU, dense and ToMoE: with the routers and their launches, not only the MLP's gain.

    time of a step = sum over its kernels of max(bytes / bandwidth, FLOPs / peak) + number of launches * LAUNCH_SECONDS

Bytes and FLOPs are those of the linears, the MLP (``roofline.py``), attention with the KV cache, lm_head, and of ToMoE
the routers and the value masks. Norms, residuals, rotary embedding and the activation count as launches only.
All-reduces, sampling and the host are left out. All of it is arithmetic. ``LAUNCH_SECONDS``, the shares of the peaks
that kernels achieve, and the speed of L2 are assumptions.

Symbols: T tokens of the step, D hidden_size, H heads, A head_dim, N experts, R rank of the value router.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import mean

from transformers import PreTrainedConfig

from tomoe_vllm.diagnostics.roofline import Chip, Cost, MLPShape, costs
from tomoe_vllm.hf.configuration_tomoe import block_shape

LAUNCH_SECONDS = 2.2e-6
"""What a kernel that depends on the one before costs in a CUDA graph besides its bytes and FLOPs: its launch, filling
and draining the GPU. An assumption within 1.8 to 2.6 us; ``tomoe doctor`` measures it."""
BANDWIDTH_SHARE, FLOPS_SHARE = 0.85, 0.7
"""Shares of the peaks of the data sheet that long kernels achieve. Assumptions, the same for dense and ToMoE."""
DENSE_LAUNCHES = 10
"""Kernels of a dense layer: norm, QKV, rotary embedding, cache write, attention, output projection, norm, gate and up,
activation, down."""
EXTRA_LAUNCHES = {"masked": 2, "shared": 2, "fused": 7}
"""Launches of a layer beyond those, without the value mask. masked and shared: ``route``, and the padding of removed
Q/K dims, counted also where none are (benchmarks/launches.py counts both); gather and grouped launch three kernels, as
dense does. fused, not counted by a tool: a cast, the router's GEMM, top-k, sorting the tokens (2), the sum of the
experts, and the padding."""
VALUE_MASK_LAUNCHES = 2
SPLIT_PRODUCTS = 3
"""Products of bfloat16 for one of float32 weights (``kernels/dot``)."""
PLAIN_COST = 16
"""Tensor-core FLOPs in the time of one on the plain cores (A100: 312 to 19.5 TFLOP/s)."""
CONTEXT = 1024
"""Tokens in the KV cache of each sequence of a decode step."""
PROMPT = 2048
"""Tokens of each prompt of a prefill step."""
MAX_GATHER_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a model on one tensor-parallel rank.

    ``num_value_masks``: layers with a value mask per token. ``query_key_dims``: mean number of kept dims of a head, of
    which the others are removed from W_q and W_k. ``mlp``: all layers, with the mean width of the experts.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mlp: MLPShape
    num_value_masks: int
    query_key_dims: float
    value_rank: int = 128

    @classmethod
    def of(cls, config: PreTrainedConfig, itemsize: float, tp_size: int = 1) -> "ModelShape":
        """Shape of a ToMoE model. ``itemsize``: bytes per weight of the linears."""
        block = block_shape(config)
        is_masked = [width < block.head_dim for width in config.vo_head_dims]
        return cls(
            name=config.model_type,
            num_heads=block.num_heads // tp_size,
            num_kv_heads=max(1, block.num_kv_heads // tp_size),
            head_dim=block.head_dim,
            vocab_size=config.vocab_size // tp_size,
            mlp=MLPShape(
                hidden_size=block.hidden_size,
                num_neurons=block.intermediate_size // tp_size,
                width=round(mean(config.expert_intermediate_sizes) / tp_size),
                num_experts=config.num_experts,
                num_matrices=block.num_mlp_matrices,
                num_layers=config.num_hidden_layers,
                itemsize=itemsize,
            ),
            num_value_masks=sum(is_masked) if config.vo_mode == "dynamic" else 0,
            query_key_dims=mean(config.qk_head_dims),
            value_rank=config.value_router_dim,
        )


LLAMA_2_7B_MODEL = ModelShape(
    name="LLaMA-2 7B",
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32_000,
    mlp=MLPShape(hidden_size=4096, num_neurons=11_008, width=5504, num_layers=32),
    num_value_masks=32,
    query_key_dims=128,
)
QWEN_2_5_1_5B = ModelShape(
    name="Qwen-2.5 1.5B",
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=151_936,
    mlp=MLPShape(hidden_size=1536, num_neurons=8960, width=4480, num_layers=28),
    num_value_masks=28,
    query_key_dims=128,
)
MODELS = (LLAMA_2_7B_MODEL, QWEN_2_5_1_5B)
"""At p = 0.5, with whole Q/K heads and a value mask per token in every layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """``num_tokens`` of a decode step are as many sequences, of :data:`CONTEXT` tokens; of a prefill step prompts of at
    most :data:`PROMPT` tokens."""

    num_tokens: int
    is_prefill: bool = False

    def __str__(self) -> str:
        return f"{'prefill' if self.is_prefill else 'decode'} {self.num_tokens:,}"

    def describe(self) -> str:
        """As words in a sentence."""
        kind = "prefill" if self.is_prefill else "decode"
        return f"a {kind} step of {self.num_tokens:,} token{'s' if self.num_tokens > 1 else ''}"

    @classmethod
    def reachable(cls, smallest: int, max_decodes: int, max_tokens: int) -> list["Step"]:
        """Steps of an engine: ``smallest`` to ``max_decodes`` decoded tokens, doubling, and its largest prefill."""
        decodes = [smallest]
        while 2 * decodes[-1] <= max_decodes:
            decodes.append(2 * decodes[-1])
        return [*(cls(num_tokens=n) for n in decodes), cls(num_tokens=max_tokens, is_prefill=True)]


def step_seconds(model: ModelShape, step: Step, chip: Chip) -> dict[str, float]:
    """Seconds of a step: dense, masked, the three paths of the shared layout, and fused."""
    achieved = replace(chip, bandwidth=BANDWIDTH_SHARE * chip.bandwidth, flops=FLOPS_SHARE * chip.flops)
    kept = replace(model, query_key_dims=model.head_dim)

    def seconds(parts: Iterable[Cost]) -> float:
        return sum(part.seconds(achieved) for part in parts)

    mlp = {path: cost.seconds(achieved) for path, cost in costs(model.mlp, step.num_tokens).items()}
    layers, head_launches = model.mlp.num_layers, 2  # lm_head and the last norm
    launches = DENSE_LAUNCHES * layers + head_launches
    attention = seconds(_attention(model, step))
    gates = seconds(_gates(model, step)) + VALUE_MASK_LAUNCHES * model.num_value_masks * LAUNCH_SECONDS

    def tomoe(layout: str, path: str) -> float:
        return attention + gates + mlp[path] + (launches + EXTRA_LAUNCHES[layout] * layers) * LAUNCH_SECONDS

    return {
        "dense": seconds(_attention(kept, step)) + mlp["dense"] + launches * LAUNCH_SECONDS,
        "masked": tomoe("masked", "dense"),
        "shared gather": tomoe("shared", "gather"),
        "shared dense": tomoe("shared", "dense"),
        "shared grouped": tomoe("shared", "grouped"),
        "fused": tomoe("fused", "materialised"),
    }


def speed(model: ModelShape, layout: str, step: Step, chip: Chip) -> float:
    """Predicted speed of a step relative to the dense model. ``layout``: a key of :func:`step_seconds`."""
    seconds = step_seconds(model, step, chip)
    return seconds["dense"] / seconds[layout]


def _attention(model: ModelShape, step: Step) -> list[Cost]:
    """The projections of all layers, attention with its KV cache, and lm_head."""
    mlp, tokens, dims = model.mlp, step.num_tokens, model.head_dim
    keys_values = 2 * model.num_kv_heads * dims
    # q and k keep query_key_dims; v and the output projection are whole
    weights = mlp.hidden_size * (model.num_heads + model.num_kv_heads) * (model.query_key_dims + dims)
    rows = -(-tokens // PROMPT) if step.is_prefill else tokens  # of lm_head
    pairs = tokens * (min(tokens, PROMPT) / 2 if step.is_prefill else CONTEXT)
    read = 0 if step.is_prefill else tokens * CONTEXT * keys_values * 2
    layers, head = mlp.num_layers, mlp.hidden_size * model.vocab_size
    return [
        _cost(layers * weights * mlp.itemsize, layers * 2 * tokens * weights),
        _cost(layers * read, layers * 4 * pairs * model.num_heads * dims),
        _cost(head * 2, 2 * rows * head),
    ]


def _gates(model: ModelShape, step: Step) -> list[Cost]:
    """The three kernels of ``kernels/route`` and ``kernels/value_mask``, of all layers. Weights are float32."""
    mlp, tokens, rank = model.mlp, step.num_tokens, model.value_rank
    hidden = 2 * tokens * mlp.hidden_size  # bytes of the hidden states
    router, down, up = 4 * mlp.num_experts * mlp.hidden_size, 4 * rank * mlp.hidden_size, 4 * rank * model.head_dim
    partial = 4 * tokens * rank
    attention = 2 * 2 * tokens * model.num_heads * model.head_dim  # read and written
    top_k = 8 * model.head_dim**2  # comparisons of all dims with all dims, of a few operations each
    kernels = [
        # tokens that one program takes: 1 and 16 (route), 16 and 64 (down), 1 (apply); each reads the weights from L2
        (mlp.num_layers, hidden + router, tokens / (1 if tokens <= 256 else 16) * router, tokens * router / 2),
        (
            model.num_value_masks,
            hidden + down + partial,
            tokens / (16 if tokens <= 64 else 64) * down,
            SPLIT_PRODUCTS * tokens * down / 2,
        ),
        (model.num_value_masks, attention + partial + up, tokens * up, PLAIN_COST * tokens * (up / 2 + top_k)),
    ]
    return [
        _cost(layers * memory_bytes, layers * flops, layers * cache_bytes)
        for layers, memory_bytes, cache_bytes, flops in kernels
    ]


def _cost(memory_bytes: float, flops: float, cache_bytes: float = 0.0) -> Cost:
    return Cost(memory_bytes=memory_bytes, cache_bytes=cache_bytes, flops=flops)
