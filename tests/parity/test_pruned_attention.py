"""Pruned attention weights and KV cache: their sizes, and equal output without the pruned dims."""

import pytest
import torch

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import logprob_differences, max_logprob_difference, reference_completion, start_engine
from tests.parity.test_families import LOGPROB_LIMIT
from tests.parity.test_loading import loading_error
from tomoe_vllm.layers.attention.pruning import PrunedLinearMethod

pytestmark = pytest.mark.engine

ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

CASES = {
    "small values in a smaller cache": (
        "llama",
        {"head_dim": 64, "vo_mode": "static", "qk_head_dims": [16, 32, 24], "vo_head_dims": [16, 7, 32]},
        32,
    ),
    "keys too wide for the smaller cache": (
        "llama",
        {"head_dim": 64, "vo_mode": "static", "qk_head_dims": [16, 40, 24], "vo_head_dims": [16, 7, 32]},
        64,
    ),
    "value masks of each token need whole values": ("llama", {"head_dim": 64}, 64),
    "partial rotary, odd numbers of kept dims": (
        "phi",
        {
            "head_dim": 80,
            "hidden_size": 160,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
            "vo_mode": "static",
            "qk_head_dims": [33, 48, 27],
            "vo_head_dims": [21, 57, 64],
        },
        64,
    ),
    "norm over whole heads before the mask": (
        "qwen3",
        {"vo_mode": "static", "qk_head_dims": [16, 32, 24], "vo_head_dims": [16, 7, 32]},
        64,
    ),
    "biases of q, k and v": ("qwen2", {"head_dim": 64, "vo_mode": "static"}, 32),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn"} | ROPE}, 32),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, 32),
}


def widths(model) -> list[dict]:
    """For each layer: outputs of qkv_proj, size of its bias, outputs of the output projection, KV head sizes."""
    found = []
    for layer in model.model.layers:
        attention = layer.self_attn
        hidden = torch.zeros(1, attention.qkv_proj.input_size)
        method = attention.qkv_proj.quant_method
        bias = method.bias if isinstance(method, PrunedLinearMethod) else attention.qkv_proj.bias
        output = getattr(attention, attention.output_name)
        columns = attention.num_heads * attention.kept.value
        found.append(
            {
                "rows": attention.qkv_proj(hidden)[0].shape[1],
                "bias": None if bias is None else len(bias),
                "outputs": output(torch.zeros(1, columns))[0].shape[1],
                "cache": (attention.attn.head_size, attention.attn.head_size_v),
            }
        )
    return found


@pytest.mark.parametrize("case", CASES)
def test_pruned_model_agrees_with_the_masked_reference(tmp_path, prompts, case):
    family, fields, head_size = CASES[case]
    model = save_tiny_model(tmp_path, family, **fields)
    config = model.config
    with start_engine(tmp_path) as engine:
        layers = engine.inspect(widths)
        completions = engine.complete(prompts)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for layer, found in enumerate(layers):
        query_key = head_dim if family == "qwen3" else config.qk_head_dims[layer]
        value = config.vo_head_dims[layer] if config.vo_mode == "static" else head_dim
        rows = (heads + kv_heads) * query_key + kv_heads * value
        assert found == {
            "rows": rows,
            "bias": None if found["bias"] is None else rows,
            "outputs": config.hidden_size,
            "cache": (head_size, head_size),
        }
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT


@pytest.mark.parametrize(
    "fields", [{"qk_head_dims": [14, 22, 26]}, {"vo_mode": "static", "qk_head_dims": [14, 32, 26]}]
)
def test_bfloat16_supports_unaligned_heads(tmp_path, prompts, fields):
    """vLLM's rotary kernel dies with a segmentation fault on such heads. bf16 is only close to float32."""
    model = save_tiny_model(tmp_path, "llama", **fields)
    with start_engine(tmp_path, dtype="bfloat16") as engine:
        completions = engine.complete(prompts[:6])
    assert torch.cat([logprob_differences(model, completion) for completion in completions]).median() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 1), ("phi", 4)])
def test_each_rank_prunes_its_own_heads(tmp_path, prompts, family, kv_heads):
    fields = {"vo_mode": "static", "num_key_value_heads": kv_heads, "vo_head_dims": [16, 7, 31]}
    model = save_tiny_model(tmp_path, family, **fields)
    with start_engine(tmp_path, tensor_parallel_size=2) as engine:
        completions = engine.complete(prompts)
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT


def test_a_smaller_head_size_fits_more_tokens_into_the_same_memory(tmp_path):
    blocks = {}
    for name, widest in (("whole", 64), ("cut", 32)):
        fields = {"vo_mode": "static", "qk_head_dims": [16, 24, widest], "vo_head_dims": [16, 7, widest]}
        save_tiny_model(tmp_path / name, "llama", head_dim=64, **fields)
        with start_engine(tmp_path / name, num_gpu_blocks_override=None) as engine:
            blocks[name] = engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert blocks["cut"] // 2 == blocks["whole"]


@pytest.mark.parametrize("fields", [{}, {"vo_mode": "static"}])
def test_dummy_weights_have_the_same_shapes(tmp_path, fields):
    """``--load-format dummy`` reads no checkpoint; the number of kept dims comes from the config."""
    model = save_tiny_model(tmp_path, "phi", **fields)
    with start_engine(tmp_path, load_format="dummy") as engine:
        rows = [layer["rows"] for layer in engine.inspect(widths)]
        (completion,) = engine.complete([[5, 6, 7]], num_tokens=2)
    config, value = model.config, [32] * 3 if not fields else model.config.vo_head_dims
    assert rows == [8 * qk + 4 * v for qk, v in zip(config.qk_head_dims, value, strict=True)]
    assert completion.logprobs.isfinite().all()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("diffkv", "kv_layout is 'diffkv', which needs an NVIDIA GPU; use 'auto' or 'padded'"),
        ("packed", "kv_layout is 'packed'; it must be one of auto, padded, diffkv"),
    ],
)
def test_unavailable_kv_layout_is_refused(tmp_path, layout, message):
    save_tiny_model(tmp_path, "llama")
    assert message in loading_error(tmp_path, hf_overrides={"kv_layout": layout})
